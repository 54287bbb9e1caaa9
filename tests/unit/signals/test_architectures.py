"""Outputs of whole models of all families that the layer pipeline knows, against transformers one text at a time."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.checkpoints.probes import TokenBatch
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.signals.collect import BatchOutputs, ProbeModel
from simmerge_ray.signals.tokens import ProbeBatch

VOCABULARY = 60
LENGTHS = (5, 9, 3, 8)
WINDOW = 4  # shorter than the longest row, so that sliding attention hides something
LAYERS = 3
NUM_WRITTEN = 5
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "gpt2", "gemma", "gemma2", "gemma3_text")
ARCHITECTURES = [
    (family, tied)
    for family in FAMILIES
    for tied in (True, False)
    if (family, tied) not in (("phi3", True), ("smollm3", False))  # as they are never published
]
# Another batch shape makes other sums in matrix products; outputs are of the order of 1 to 10.
ROUNDING = {"rtol": 1e-5, "atol": 2e-5}

MakeCheckpoint = Callable[..., CheckpointRef]


def tiny_config(family: str, tied: bool):
    from transformers import AutoConfig

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if family != "gpt2":
        settings |= {"intermediate_size": 48, "num_key_value_heads": 2}
    if family.startswith(("gemma", "qwen3")):
        settings |= {"head_dim": 16}  # not hidden_size / num_attention_heads
    if family in ("mistral", "gemma2", "gemma3_text", "phi3"):
        settings |= {"sliding_window": WINDOW}
    if family == "gemma2":
        settings |= {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 4.0}
    if family in ("gemma2", "gemma3_text"):
        settings |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    if family == "qwen2":
        settings |= {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    if family == "smollm3":
        settings |= {"no_rope_layers": [1, 0, 1]}
    return AutoConfig.for_model(family, **settings)


@pytest.fixture(scope="module")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """(family, tied, seed) -> a random checkpoint, made once; read only."""
    root = tmp_path_factory.mktemp("architectures")

    @functools.cache
    def make(family: str, tied: bool, seed: int = 0) -> CheckpointRef:
        from transformers import AutoModelForCausalLM

        path = root / f"{family}-{'tied' if tied else 'untied'}-{seed}"
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, tied))
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases, too
                parameter.add_(0.25 * torch.randn_like(parameter))
        model.save_pretrained(path)
        return CheckpointRef(path.name, path)

    return make


@functools.cache
def token_batch() -> TokenBatch:
    """Rows of LENGTHS tokens, right-padded."""
    generator = torch.Generator().manual_seed(3)
    mask = (torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(2, VOCABULARY, mask.shape, generator=generator)
    return TokenBatch(ids * mask, mask)


@functools.cache
def probe_batch() -> ProbeBatch:
    """Two of three positions sampled, attention rows kept at two of three of these."""
    tokens = token_batch()
    rows, columns = (
        places[torch.arange(len(places)) % 3 != 1] for places in tokens.attention_mask.nonzero(as_tuple=True)
    )
    return ProbeBatch(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        rows=rows,
        columns=columns,
        greedy=torch.zeros(len(rows), dtype=torch.bool),
        with_attention=torch.arange(len(rows)) % 3 != 0,
        next_token=torch.full_like(rows, -1),
        probe=rows,
    )


def equal_bits(left: BatchOutputs, right: BatchOutputs) -> bool:
    return all(torch.equal(getattr(left, part), getattr(right, part)) for part in ("logits", "hidden", "attention"))


def copy_of(ref: CheckpointRef, path: Path) -> CheckpointRef:
    return CheckpointRef(path.name, Path(shutil.copytree(ref.path, path)))


def edit_config(ref: CheckpointRef, **changes) -> None:
    file = ref.path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(ref: CheckpointRef, edit: Callable[[dict], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(ref.path / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, ref.path / "model.safetensors")


@pytest.mark.parametrize(("family", "tied"), ARCHITECTURES)
def test_outputs_and_continuation_equal_transformers_one_text_at_a_time(make_checkpoint, family, tied):
    from transformers import AutoModelForCausalLM

    ref, batch, tokens = make_checkpoint(family, tied), probe_batch(), token_batch()
    model = ProbeModel()
    found = model.outputs(ref, batch)
    written = model.continuation(ref, tokens, NUM_WRITTEN) if tied else None  # slow; the head is compared anyway
    reference = AutoModelForCausalLM.from_pretrained(ref.path, attn_implementation="eager").eval()
    kept = batch.with_attention.nonzero()[:, 0].tolist()
    for row, length in enumerate(LENGTHS):
        ids = tokens.input_ids[row : row + 1, :length]
        with torch.no_grad():
            alone = reference(ids, output_hidden_states=True, output_attentions=True)
        for place in (batch.rows == row).nonzero()[:, 0].tolist():
            column = int(batch.columns[place])
            torch.testing.assert_close(found.logits[place], alone.logits[0, column], **ROUNDING)
            states = torch.stack([layer[0, column] for layer in alone.hidden_states])
            torch.testing.assert_close(found.hidden[:, place], states, **ROUNDING)
            if place in kept:
                rows = torch.stack([layer[0, :, column] for layer in alone.attentions])
                of_place = found.attention[:, :, kept.index(place)]
                torch.testing.assert_close(of_place[..., :length], rows, **ROUNDING)
                assert not of_place[..., column + 1 :].any()
        if written is not None:
            alone_written = reference.generate(
                ids, max_new_tokens=NUM_WRITTEN, min_new_tokens=NUM_WRITTEN, do_sample=False, pad_token_id=0
            )
            assert torch.equal(written[row], alone_written[0, length:])


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3_text", "phi3"])
def test_a_sliding_window_hides_what_lies_behind_it(make_checkpoint, family):
    found = ProbeModel().outputs(make_checkpoint(family, True), probe_batch())
    far = probe_batch().columns[probe_batch().with_attention] >= WINDOW
    assert far.any()
    hidden_layers = [bool((found.attention[layer][:, far, 0] == 0).all()) for layer in range(LAYERS)]
    expected = {"mistral": [True] * 3, "phi3": [True] * 3, "qwen2": [False, True, True]}
    assert hidden_layers == expected.get(family, [True, False, True])


@pytest.mark.parametrize(("family", "tied"), ARCHITECTURES)
def test_weights_put_into_a_model_give_the_bits_of_a_fresh_load(make_checkpoint, family, tied, monkeypatch):
    import simmerge_ray.signals.collect as collect

    first, second = make_checkpoint(family, tied), make_checkpoint(family, tied, 1)
    fresh, batch, reused = ProbeModel().outputs(second, probe_batch()), probe_batch(), ProbeModel()
    before = reused.outputs(first, batch)
    monkeypatch.setattr(collect, "load_model", None)  # a second load would fail
    assert equal_bits(reused.outputs(second, batch), fresh)
    assert not torch.equal(before.logits, fresh.logits)
    assert equal_bits(reused.outputs(first, batch), before)


def test_weights_are_not_put_into_a_model_of_another_configuration(make_checkpoint, tmp_path):
    """Fine-tunes with another rotary base have the same shapes and names."""
    ref = make_checkpoint("llama", False)
    other = copy_of(ref, tmp_path / "other")
    edit_config(other, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    model = ProbeModel()
    before = model.outputs(ref, probe_batch())
    after = model.outputs(other, probe_batch())
    assert equal_bits(after, ProbeModel().outputs(other, probe_batch()))
    assert not torch.allclose(before.logits, after.logits)


def test_a_tied_model_whose_file_holds_two_matrices(make_checkpoint, tmp_path):
    """transformers ties them only where they are equal; so does a model that is used again."""
    ref = make_checkpoint("llama", True)
    same, differing = copy_of(ref, tmp_path / "same"), copy_of(ref, tmp_path / "differing")
    name = "model.embed_tokens.weight"
    edit_tensors(same, lambda tensors: tensors.update({"lm_head.weight": tensors[name].clone()}))
    edit_tensors(differing, lambda tensors: tensors.update({"lm_head.weight": 2 * tensors[name]}))
    model, batch = ProbeModel(), probe_batch()
    plain = model.outputs(ref, batch)
    assert equal_bits(model.outputs(same, batch), plain)
    doubled = model.outputs(differing, batch)
    torch.testing.assert_close(doubled.logits, 2 * plain.logits, **ROUNDING)
    assert equal_bits(model.outputs(ref, batch), plain)


def test_names_without_the_base_model_s_prefix_and_unknown_buffers(make_checkpoint, tmp_path, monkeypatch):
    """As the files of GPT-2 on the hub have them."""
    import simmerge_ray.signals.collect as collect

    ref = make_checkpoint("gpt2", True)
    bare = copy_of(ref, tmp_path / "bare")

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)

    edit_tensors(bare, rename)
    fresh = ProbeModel().outputs(bare, probe_batch())
    model = ProbeModel()
    assert equal_bits(model.outputs(make_checkpoint("gpt2", True, 1), probe_batch()), fresh) is False
    monkeypatch.setattr(collect, "load_model", None)
    assert equal_bits(model.outputs(bare, probe_batch()), fresh)


def test_a_continuation_knows_no_penalty_and_not_the_model_before(make_checkpoint, tmp_path):
    ref = make_checkpoint("qwen2", False)
    penalised = copy_of(ref, tmp_path / "penalised")
    settings = {"eos_token_id": [1], "repetition_penalty": 5.0, "do_sample": True, "temperature": 0.5}
    (penalised.path / "generation_config.json").write_text(json.dumps(settings))
    expected = ProbeModel().continuation(ref, token_batch(), 8)
    model = ProbeModel()
    assert torch.equal(model.continuation(penalised, token_batch(), 8), expected)
    assert torch.equal(model.continuation(ref, token_batch(), 8), expected)
    assert not (expected == 1).any()


def test_an_end_of_text_is_no_part_of_a_continuation(make_checkpoint, tmp_path):
    """The base's own ends of text count, those of generation_config.json before those of config.json."""
    ref = make_checkpoint("llama", True)
    usual = ProbeModel().continuation(ref, token_batch(), 8)
    ended = copy_of(ref, tmp_path / "ended")
    first = int(usual[0, 0])
    (ended.path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, first]}))
    assert not (ProbeModel().continuation(ended, token_batch(), 8) == first).any()


def test_generation_settings_that_are_not_json(make_checkpoint, tmp_path):
    ref = copy_of(make_checkpoint("llama", True), tmp_path / "damaged")
    (ref.path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="'damaged': cannot read its generation_config.json"):
        ProbeModel().continuation(ref, token_batch(), 2)


def write_adapter(path: Path, module: str, up: torch.Tensor, down: torch.Tensor, transposed: bool) -> Path:
    from safetensors.torch import save_file

    path.mkdir()
    config = {"peft_type": "LORA", "r": down.shape[0], "lora_alpha": 8, "fan_in_fan_out": transposed}
    (path / "adapter_config.json").write_text(json.dumps(config))
    name = f"base_model.model.{module}"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path / "adapter_model.safetensors")
    return path


def make_adapted(ref: CheckpointRef, root: Path, module: str, transposed: bool) -> tuple[CheckpointRef, CheckpointRef]:
    """(the checkpoint with an adapter, the same with the adapter's change in its weights)."""
    from safetensors.torch import load_file

    shape = load_file(ref.path / "model.safetensors")[f"{module}.weight"].shape
    num_out, num_in = reversed(shape) if transposed else shape
    generator = torch.Generator().manual_seed(5)
    up, down = torch.randn(num_out, 2, generator=generator), torch.randn(2, num_in, generator=generator)
    adapter = write_adapter(root / "adapter", module, up, down, transposed)
    change = 8 / 2 * (up @ down)
    merged = copy_of(ref, root / "merged")
    edit_tensors(merged, lambda tensors: tensors[f"{module}.weight"].add_(change.T if transposed else change))
    return CheckpointRef("adapted", ref.path, adapter=adapter), merged


ADAPTED = [("llama", "model.layers.1.self_attn.v_proj", False), ("gpt2", "transformer.h.1.attn.c_attn", True)]


@pytest.mark.parametrize(("family", "module", "transposed"), ADAPTED)
def test_an_adapter_gives_the_outputs_of_the_merged_weights(make_checkpoint, tmp_path, family, module, transposed):
    ref = make_checkpoint(family, True)
    adapted, merged = make_adapted(ref, tmp_path, module, transposed)
    model, batch = ProbeModel(), probe_batch()
    plain, with_adapter = model.outputs(ref, batch), model.outputs(adapted, batch)
    expected = model.outputs(merged, batch)
    for part in ("logits", "hidden", "attention"):
        torch.testing.assert_close(getattr(with_adapter, part), getattr(expected, part), **ROUNDING)
    assert equal_bits(with_adapter, ProbeModel().outputs(adapted, batch))
    assert equal_bits(model.outputs(ref, batch), plain), "the adapter stayed in the model"


@pytest.mark.parametrize("reused", [False, True])
def test_a_weight_that_is_not_finite_is_named(make_checkpoint, tmp_path, reused):
    ref = make_checkpoint("llama", True)
    broken = copy_of(ref, tmp_path / "broken")
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(broken, lambda tensors: tensors[name][3, 4].fill_(float("nan")))
    model = ProbeModel()
    if reused:
        before = model.outputs(ref, probe_batch())
    with pytest.raises(CheckpointError, match=rf"'broken': tensor {name} holds NaN or infinity"):
        model.outputs(broken, probe_batch())
    if reused:
        assert equal_bits(model.outputs(ref, probe_batch()), before)


@pytest.mark.parametrize("reused", [False, True])
def test_an_absent_tensor_is_an_error_and_not_random_numbers(make_checkpoint, tmp_path, reused):
    ref = make_checkpoint("llama", True)
    broken = copy_of(ref, tmp_path / "broken")
    edit_tensors(broken, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    model = ProbeModel()
    if reused:
        model.outputs(ref, probe_batch())
    with pytest.raises(CheckpointError, match=r"'broken' lacks tensors: model\.layers\.2\.mlp\.up_proj\.weight"):
        model.outputs(broken, probe_batch())


def test_files_that_cannot_be_loaded(make_checkpoint, tmp_path):
    ref = make_checkpoint("llama", True)
    cut = copy_of(ref, tmp_path / "cut")
    file = cut.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="'cut'"):
        ProbeModel().outputs(cut, probe_batch())
    unknown = copy_of(ref, tmp_path / "unknown")
    edit_config(unknown, model_type="no-such-type")
    with pytest.raises(CheckpointError, match="'unknown': transformers cannot load it"):
        ProbeModel().outputs(unknown, probe_batch())
    with pytest.raises(CheckpointError, match="'absent'"):
        ProbeModel().outputs(CheckpointRef("absent", tmp_path / "absent"), probe_batch())


def test_logits_that_overflow_are_an_error(make_checkpoint, tmp_path):
    ref = copy_of(make_checkpoint("llama", False), tmp_path / "huge")
    edit_tensors(ref, lambda tensors: tensors["lm_head.weight"].mul_(1e38))
    with pytest.raises(CheckpointError, match="'huge': its logits on the probes are not finite"):
        ProbeModel().outputs(ref, probe_batch())
