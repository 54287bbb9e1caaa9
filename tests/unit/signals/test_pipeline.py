"""The layer pipeline: the bits of whole models, weights of the own stage only, and plans that fit."""

from __future__ import annotations

import itertools
import json
import math
import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simmerge_ray.base.errors import CheckpointError, ConfigError
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef, read_config
from simmerge_ray.merging.engine.sources import TensorSource
from simmerge_ray.signals import pipeline
from simmerge_ray.signals.collect import ProbeModel
from simmerge_ray.signals.pipeline import StageModel, join_stages, staged_continuation
from simmerge_ray.signals.stages import FAMILIES, LayerRange, StageSizes, activation_bytes, model_bytes, plan_stages
from tests.unit.signals.test_architectures import (
    ADAPTED,
    ARCHITECTURES,
    LAYERS,
    NUM_WRITTEN,
    copy_of,
    edit_config,
    edit_tensors,
    equal_bits,
    make_adapted,
    make_checkpoint,  # noqa: F401
    probe_batch,
    token_batch,
)
from tests.unit.signals.test_architectures import FAMILIES as TESTED

CUTS = {1: (0, 3), 2: (0, 1, 3), 3: (0, 1, 2, 3)}


def stage_bytes(ref: CheckpointRef, stage: LayerRange) -> int:
    return 4 * StageSizes(ref).elements(stage)


def stages_of(num_stages: int) -> list[LayerRange]:
    return [LayerRange(first, last, LAYERS) for first, last in itertools.pairwise(CUTS[num_stages])]


def run_in_stages(ref: CheckpointRef, stages, models=None):
    """Outputs of all stages, by one model in turn or each by its own."""
    parts = []
    models = models or [StageModel()] * len(stages)
    for model, stage in zip(models, stages, strict=True):
        parts.append(model.run(ref, stage, probe_batch(), parts[-1].states if parts else None))
    return parts


def tensors_of_stage(ref: CheckpointRef, stage: LayerRange, tied: bool) -> set[str]:
    """Names in the files, told by their looks."""
    names = set()
    for name in read_headers(ref):
        layer = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
        embeds = re.search(r"embed_tokens|wte", name)
        if (
            (layer and stage.first <= int(layer[1]) < stage.last)
            or (stage.is_first and (embeds or "wpe" in name))
            or (stage.is_last and not layer and re.search(r"norm|ln_f|lm_head", name))
            or (stage.is_last and tied and embeds)
        ):
            names.add(name)
    return names


def test_every_family_of_the_table_is_tested():
    assert set(FAMILIES) == set(TESTED)


@pytest.mark.parametrize(("family", "tied"), ARCHITECTURES)
def test_stages_give_the_bits_of_the_whole_model_from_their_own_tensors(make_checkpoint, family, tied, monkeypatch):  # noqa: F811
    ref = make_checkpoint(family, tied)
    expected = ProbeModel().outputs(ref, probe_batch())
    read: list[str] = []
    monkeypatch.setattr(TensorSource, "read_raw", counted(read, TensorSource.read_raw))
    model = StageModel()
    for num_stages in CUTS if tied else (3,):
        parts = []
        for stage in stages_of(num_stages):
            read.clear()
            parts.append(model.run(ref, stage, probe_batch(), parts[-1].states if parts else None))
            own = tensors_of_stage(ref, stage, tied)
            assert sorted(read) == sorted(own), "each once, and no other"
            parameters = list(model.load(ref, stage).parameters())
            assert not any(tensor.is_meta for tensor in (*parameters, *model.load(ref, stage).buffers()))
            held = sum(parameter.numel() for parameter in parameters)
            assert held == sum(math.prod(read_headers(ref)[name].shape) for name in own)
            assert 4 * held == stage_bytes(ref, stage)
            assert (parts[-1].logits is None, parts[-1].states is None) == (not stage.is_last, stage.is_last)
        assert equal_bits(join_stages(parts), expected)


def counted(read: list[str], method):
    def read_raw(self, name, *args):
        read.append(name)
        return method(self, name, *args)

    return read_raw


def test_a_stage_is_used_again_for_another_checkpoint_and_kept_for_the_next_batch(make_checkpoint, monkeypatch):  # noqa: F811
    first, second = make_checkpoint("gemma2", True), make_checkpoint("gemma2", True, 1)
    stages = stages_of(2)
    models = [StageModel() for _ in stages]
    expected = {ref: ProbeModel().outputs(ref, probe_batch()) for ref in (first, second)}
    assert equal_bits(join_stages(run_in_stages(first, stages, models)), expected[first])
    monkeypatch.setattr(pipeline, "_build_stage", None)  # building once more would fail
    assert equal_bits(join_stages(run_in_stages(second, stages, models)), expected[second])
    monkeypatch.setattr(pipeline, "TensorSource", None)  # and so would reading
    assert equal_bits(join_stages(run_in_stages(second, stages, models)), expected[second])


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gpt2", True), ("gemma3_text", True)])
def test_a_continuation_in_stages_is_that_of_the_whole_model(make_checkpoint, tmp_path, family, tied):  # noqa: F811
    """Also where its first token is made one that ends a text."""
    ref = copy_of(make_checkpoint(family, tied), tmp_path / "ended")
    stages, tokens = stages_of(2), token_batch()
    written = staged_continuation(StageModel(), ref, stages, tokens, NUM_WRITTEN)
    assert torch.equal(written, ProbeModel().continuation(ref, tokens, NUM_WRITTEN))
    (ref.path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, int(written[0, 0])]}))
    other = staged_continuation(StageModel(), ref, stages, tokens, NUM_WRITTEN)
    assert torch.equal(other, ProbeModel().continuation(ref, tokens, NUM_WRITTEN))
    assert not (other == written[0, 0]).any()


@pytest.mark.parametrize(("family", "module", "transposed"), ADAPTED)
def test_an_adapter_in_stages_gives_the_bits_of_the_whole_model(make_checkpoint, tmp_path, family, module, transposed):  # noqa: F811
    adapted, _ = make_adapted(make_checkpoint(family, True), tmp_path, module, transposed)
    assert equal_bits(join_stages(run_in_stages(adapted, stages_of(3))), ProbeModel().outputs(adapted, probe_batch()))


@pytest.mark.parametrize(("num_stages", "factor"), [(1, 1.0), (1, 2.0), (3, 2.0)])
def test_a_tied_model_whose_file_holds_two_matrices(make_checkpoint, tmp_path, num_stages, factor):  # noqa: F811
    ref = copy_of(make_checkpoint("llama", True), tmp_path / "two")
    name = "model.embed_tokens.weight"
    edit_tensors(ref, lambda tensors: tensors.update({"lm_head.weight": factor * tensors[name]}))
    expected = ProbeModel().outputs(ref, probe_batch())
    stages = stages_of(num_stages)
    assert equal_bits(join_stages(run_in_stages(ref, stages)), expected)
    model = StageModel()
    for stage in stages:
        assert stage_bytes(ref, stage) == 4 * sum(p.numel() for p in model.load(ref, stage).parameters())


@pytest.mark.parametrize("num_stages", CUTS)
def test_a_tied_model_whose_file_holds_the_head_only(make_checkpoint, tmp_path, num_stages):  # noqa: F811
    ref = copy_of(make_checkpoint("llama", True), tmp_path / "head")
    name = "model.embed_tokens.weight"
    edit_tensors(ref, lambda tensors: tensors.update({"lm_head.weight": tensors.pop(name)}))
    stages = stages_of(num_stages)
    assert equal_bits(join_stages(run_in_stages(ref, stages)), ProbeModel().outputs(ref, probe_batch()))
    model = StageModel()
    for stage in stages:
        assert stage_bytes(ref, stage) == 4 * sum(p.numel() for p in model.load(ref, stage).parameters())


def test_names_without_the_base_model_s_prefix(make_checkpoint, tmp_path):  # noqa: F811
    ref = make_checkpoint("gpt2", True)
    bare = copy_of(ref, tmp_path / "bare")

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    edit_tensors(bare, rename)
    assert equal_bits(join_stages(run_in_stages(bare, stages_of(2))), ProbeModel().outputs(ref, probe_batch()))
    assert [stage_bytes(bare, stage) for stage in stages_of(2)] == [stage_bytes(ref, stage) for stage in stages_of(2)]


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # said whenever the flag is looked at
def test_bfloat16_in_stages_gives_the_bits_of_the_whole_model(make_checkpoint):  # noqa: F811
    for family in ("gpt2", "gemma"):
        ref = make_checkpoint(family, True)
        models = [StageModel(dtype=torch.bfloat16)] * 3
        with torch.backends.mkldnn.flags(enabled=False):  # its bfloat16 kernels crash on some virtual machines
            whole = ProbeModel(dtype=torch.bfloat16).outputs(ref, probe_batch())
            assert equal_bits(join_stages(run_in_stages(ref, stages_of(3), models)), whole)


def test_the_check_of_a_family_does_not_move_the_caller_s_random_numbers(make_checkpoint):  # noqa: F811
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    StageModel().load(make_checkpoint("gemma", True), LayerRange(0, 1, LAYERS))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (pipeline.Family("transformer.wte", None, "transformer.h", "transformer.ln_f"), "hidden states"),
        (pipeline.Family("transformer.wte", "transformer.wpe", "transformer.h", "transformer.drop"), "hidden states"),
    ],
)
def test_a_row_that_does_not_describe_its_family_is_found_by_the_check(make_checkpoint, monkeypatch, row, problem):  # noqa: F811
    """Positions added by every stage; the final norm applied by every stage."""
    monkeypatch.setitem(FAMILIES, "gpt2", row)
    with pytest.raises(CheckpointError, match=rf"family 'gpt2' .* other {problem} in stages .*--memory-per-worker"):
        StageModel().load(make_checkpoint("gpt2", False), LayerRange(0, 1, LAYERS))


def test_an_unknown_family_is_named_with_the_known_ones_and_the_way_out(make_checkpoint, tmp_path):  # noqa: F811
    ref = copy_of(make_checkpoint("llama", True), tmp_path / "other")
    edit_config(ref, model_type="gemma4")
    expected = r"'other': unknown model family .* 'gemma4' \(did you mean 'gemma.*'\?\); known: gemma, .*--memory-per-w"
    for use in (
        lambda: StageModel().load(ref, LayerRange(0, 1, LAYERS)),
        lambda: plan_stages(ref, 10**9, 0),
        lambda: stage_bytes(ref, LayerRange(0, 1, LAYERS)),
    ):
        with pytest.raises(CheckpointError, match=expected):
            use()


def test_weights_that_cannot_be_used_are_named(make_checkpoint, tmp_path):  # noqa: F811
    ref = make_checkpoint("llama", True)
    name = "model.layers.1.mlp.up_proj.weight"
    nan, absent, shape = (copy_of(ref, tmp_path / name) for name in ("nan", "absent", "shape"))
    edit_tensors(nan, lambda tensors: tensors[name][3, 4].fill_(float("nan")))
    edit_tensors(absent, lambda tensors: tensors.pop(name))
    edit_tensors(shape, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    model, middle = StageModel(), LayerRange(1, 2, LAYERS)
    before = model.run(ref, LayerRange(0, 1, LAYERS), probe_batch(), None).states
    expected = model.run(ref, middle, probe_batch(), before)
    for broken, problem in (
        (nan, "holds NaN or infinity"),
        (absent, f"lacks tensors: {name}"),
        (shape, r"has shape \(47, 32\), its config.json asks for \(48, 32\)"),
    ):
        with pytest.raises(CheckpointError, match=rf"'{broken.id}'.*{name}.*|'{broken.id}' {problem}") as error:
            model.run(broken, middle, probe_batch(), before)
        assert re.search(problem, str(error.value))
        model.run(broken, LayerRange(2, 3, LAYERS), probe_batch(), before)  # the other stages do not see it
    assert torch.equal(model.run(ref, middle, probe_batch(), before).states, expected.states)


def test_a_tensor_that_is_absent_from_an_untied_model_is_not_taken_from_the_embedding(make_checkpoint, tmp_path):  # noqa: F811
    ref = copy_of(make_checkpoint("llama", False), tmp_path / "headless")
    edit_tensors(ref, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"'headless' lacks tensors: lm_head\.weight"):
        StageModel().load(ref, LayerRange(1, 3, LAYERS))


def test_logits_that_overflow_are_an_error(make_checkpoint, tmp_path):  # noqa: F811
    ref = copy_of(make_checkpoint("llama", False), tmp_path / "huge")
    edit_tensors(ref, lambda tensors: tensors["lm_head.weight"].mul_(1e38))
    with pytest.raises(CheckpointError, match="'huge': its logits on the probes are not finite"):
        run_in_stages(ref, stages_of(2))


def test_stages_that_do_not_fit_each_other(make_checkpoint):  # noqa: F811
    ref = make_checkpoint("llama", True)
    for bounds in ((1, 1, 3), (2, 1, 3), (-1, 1, 3), (0, 4, 3)):
        with pytest.raises(ValueError, match="0 <= first < last <= num_layers"):
            LayerRange(*bounds)
    parts = run_in_stages(ref, stages_of(3))
    for missing in range(3):
        with pytest.raises(ValueError, match="do not make a whole model"):
            join_stages([part for number, part in enumerate(parts) if number != missing])
    with pytest.raises(ValueError, match="starts from tokens"):
        StageModel().run(ref, LayerRange(0, 1, LAYERS), probe_batch(), parts[0].states)
    with pytest.raises(ValueError, match="starts from the hidden states"):
        StageModel().run(ref, LayerRange(1, 2, LAYERS), probe_batch(), None)
    with pytest.raises(CheckpointError, match="has 3 decoder layers; the stage is one of a model with 4"):
        StageModel().load(ref, LayerRange(0, 1, 4))


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("gpt2", True), ("gemma2", True)])
def test_a_plan_has_the_fewest_stages_that_fit_and_is_balanced(make_checkpoint, family, tied):  # noqa: F811
    """Against all ways to cut three layers."""
    ref = make_checkpoint(family, tied)
    every = [
        [LayerRange(first, last, LAYERS) for first, last in itertools.pairwise((0, *cuts, LAYERS))]
        for size in range(LAYERS)
        for cuts in itertools.combinations(range(1, LAYERS), size)
    ]
    largest = [max(stage_bytes(ref, stage) for stage in stages) for stages in every]
    assert model_bytes(read_headers(ref)) == stage_bytes(ref, LayerRange(0, LAYERS, LAYERS)) == largest[0]
    for memory in sorted({value + slack for value in largest for slack in (0, 1)}):
        fitting = [index for index in range(len(every)) if largest[index] <= memory]
        fewest = min(len(every[index]) for index in fitting)
        found = plan_stages(ref, memory + 100, 100)
        assert len(found) == fewest
        assert max(stage_bytes(ref, stage) for stage in found) == min(
            largest[index] for index in fitting if len(every[index]) == fewest
        )


def test_a_worker_that_cannot_hold_one_layer_is_told_how_much_it_needs(make_checkpoint):  # noqa: F811
    ref = make_checkpoint("llama", False)
    single = [stage_bytes(ref, stage) for stage in stages_of(3)]
    needed = max(single) + 1000
    with pytest.raises(ConfigError, match=rf"layer {single.index(max(single))} alone needs {needed:,} bytes, 1,000 of"):
        plan_stages(ref, needed - 1, 1000)
    assert len(plan_stages(ref, needed, 1000)) == 3


class PeakBytes(TorchDispatchMode):
    """Bytes of the tensors that operations make beside those of a model, at the most at one time."""

    def __init__(self, model) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._seen:
                    self._add(storage)
        return result

    def _add(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gemma2", "gemma3_text"])
@pytest.mark.parametrize(("shape", "num_positions"), [((4, 60), 3), ((12, 9), 12 * 9)])
def test_activation_bytes_are_an_upper_estimate_and_no_wild_one(make_checkpoint, family, shape, num_positions):  # noqa: F811
    """Attention, then recorded outputs are the most of it."""
    ref, stage = make_checkpoint(family, family != "phi3"), LayerRange(0, LAYERS, LAYERS)
    ids = torch.ones(shape, dtype=torch.int64)
    rows, columns = (places[:num_positions] for places in ids.nonzero(as_tuple=True))
    everywhere = torch.ones(len(rows), dtype=torch.bool)
    batch = pipeline.ProbeBatch(ids, ids, rows, columns, ~everywhere, everywhere, -rows, rows)
    model = StageModel()
    with PeakBytes(model.load(ref, stage)) as measured:
        model.run(ref, stage, batch, None)
    estimate = activation_bytes(read_config(ref), *shape, num_positions)
    assert measured.peak < estimate < 3 * measured.peak
