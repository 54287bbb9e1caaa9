"""The engine: what it writes is the operator on every tensor, in blocks as at once; nothing is lost or half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from simmerge_ray.base.errors import CheckpointError, IncompatibleCheckpointsError, OutputError
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.engine import kernels
from simmerge_ray.merging.engine.compute import Computer
from simmerge_ray.merging.engine.fallbacks import linear_form
from simmerge_ray.merging.engine.seeds import Seeds
from simmerge_ray.merging.engine.sources import TensorSource
from simmerge_ray.merging.graph import Read
from simmerge_ray.merging.in_memory import merged_tensors
from simmerge_ray.merging.write.directory import write_graph, write_merge
from simmerge_ray.merging.write.output import MergeResult, WriteOptions
from simmerge_ray.merging.write.tensors import JOURNAL, write_tensors
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, make_arm, parse_arms
from simmerge_ray.plans.plan import (
    MergePlan,
    MergeStep,
    ResolvedPlan,
    fold_plan,
    pair_plan,
    read_plan,
    resolve_plan,
    unmerged,
)
from simmerge_ray.plans.recipe import recipe_of
from tests import tiny
from tests.operators import two_way
from tests.readers import TensorReader

LINEAR = make_arm("linear")
TWO_WAY = [name for name, spec in OPERATOR_SPECS.items() if spec.max_sources != 1 and not spec.needs_grams]
IN_BLOCKS = ("linear", "slerp", "nuslerp", "task_arithmetic", "ties")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Every tensor takes many blocks, the last one is short."""
    monkeypatch.setattr(kernels, "BLOCK", 1000)
    monkeypatch.setattr(kernels, "PAIR_BLOCK", 1500)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16", "mixed"])
def zoo(request, tmp_path_factory):
    """A catalogue whose checkpoints are stored in one dtype, or each in another."""
    root = tmp_path_factory.mktemp(request.param)
    path = tiny.make_catalogue(root)
    names = ("base", "m0", "m1", "m2")
    dtypes = dict.fromkeys(names, request.param)
    if request.param == "mixed":
        dtypes = dict(zip(names, ("float32", "bfloat16", "float16", "float32"), strict=True))
    for name in names:
        tensors = load_file(root / name / "model.safetensors")
        tensors = {key: value.to(getattr(torch, dtypes[name])) for key, value in tensors.items()}
        save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})
    return load_catalogue(path)


# One representable number up or down, relative; and the rounding of float32 where the terms of a sum cancel.
ONE_ULP = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.5, 0.3])
@pytest.mark.parametrize("operator", TWO_WAY)
def test_the_written_checkpoint_holds_the_operator_applied_to_every_tensor(zoo, tmp_path, operator, weight):
    resolved = resolve_plan(pair_plan("m0", "m1", make_arm(operator), weight), zoo)
    out = write_merge(resolved, tmp_path / "out").path
    written = TensorReader(CheckpointRef("out", out))
    left, right, base = (TensorReader(ref) for ref in (*resolved.checkpoints, zoo.base))
    assert written.specs.keys() == left.specs.keys()
    seeds = Seeds(compile_plan(resolved))
    for name in written.specs:
        uses_base = OPERATOR_SPECS[operator].uses_base
        sources = [seeds.of(Read(ref.id, name), 1, name) for ref in resolved.checkpoints]
        expected = two_way(
            operator,
            base.read(name) if uses_base else None,
            left.read(name),
            right.read(name),
            weight=weight,
            **({"seeds": sources} if OPERATOR_SPECS[operator].random else {}),
        )
        dtype = torch.promote_types(left.read(name).dtype, right.read(name).dtype)
        found = written.read(name)
        assert found.dtype == dtype and found.shape == expected.shape
        if operator not in IN_BLOCKS:
            assert torch.equal(found, expected.to(dtype))
        else:
            torch.testing.assert_close(found, expected.to(dtype), rtol=ONE_ULP[dtype], atol=2e-7)


def test_the_stream_has_the_bytes_of_the_file(zoo, tmp_path):
    plan = fold_plan(("m0", "m1", "m2"), [make_arm("slerp"), make_arm("ties", {"density": 0.2})])
    resolved = resolve_plan(plan, zoo)
    written = TensorReader(CheckpointRef("out", write_merge(resolved, tmp_path / "out").path))
    streamed = dict(merged_tensors(resolved))
    assert list(streamed) == list(written.specs)
    assert all(torch.equal(streamed[name], written.read(name)) for name in streamed)


@pytest.mark.parametrize("num_threads", [2, 3, 40])
@pytest.mark.parametrize(
    "arm", ["slerp", "ties(density=0.2)", "dare_ties(density=0.5)", "ties(density=0.2,trim_scope=global)"]
)
def test_the_number_of_threads_changes_no_byte_of_the_stream(zoo, arm, num_threads):
    resolved = resolve_plan(pair_plan("m0", "m1", parse_arms([arm])[0]), zoo)
    alone, reports, of_threads = dict(merged_tensors(resolved)), [], []
    together = dict(merged_tensors(resolved, of_threads, num_threads))
    list(merged_tensors(resolved, reports))
    assert list(together) == list(alone) and of_threads == reports
    assert all(torch.equal(together[name], alone[name]) for name in alone)


def test_who_stops_reading_a_stream_of_several_threads_waits_for_what_is_computed_only(zoo, monkeypatch):
    computed = []
    compute = Computer.compute

    def counted(self, output, keep):
        computed.append(output.name)
        return compute(self, output, keep)

    monkeypatch.setattr(Computer, "compute", counted)
    stream = merged_tensors(resolve_plan(pair_plan("m0", "m1", LINEAR), zoo), num_threads=2)
    first, _ = next(stream)
    stream.close()
    assert first in computed and len(computed) <= 1 + 3  # the one that was taken, and three ahead
    assert not [one for one in threading.enumerate() if one.name.startswith("merge_")]


def test_an_error_in_a_thread_ends_the_stream_at_its_tensor(zoo, monkeypatch):
    compute, names = Computer.compute, [name for name, _ in merged_tensors(unmerged(zoo.ref("m0")))]

    def failing(self, output, keep):
        if output.name == names[3]:
            raise CheckpointError("here")
        return compute(self, output, keep)

    monkeypatch.setattr(Computer, "compute", failing)
    taken = []
    with pytest.raises(CheckpointError, match="here"):
        for name, _ in merged_tensors(resolve_plan(pair_plan("m0", "m1", LINEAR), zoo), num_threads=3):
            taken.append(name)
    assert taken == names[:3]


@pytest.mark.parametrize("operator", ["linear", "slerp", "nuslerp", "ties", "task_arithmetic", "breadcrumbs"])
def test_a_fold_is_the_composition_of_its_steps_in_float32(catalogue, tmp_path, operator):
    plan = MergePlan((MergeStep("m0", "m1", make_arm(operator)), MergeStep("#1", "m2", make_arm("slerp"), 1 / 3)))
    resolved = resolve_plan(plan, catalogue)
    readers = {ref.id: TensorReader(ref) for ref in (*resolved.checkpoints, catalogue.base)}
    for name, tensor in merged_tensors(resolved):
        base, *members = (readers[key].read(name) for key in ("base", "m0", "m1", "m2"))
        inner = two_way(operator, base if OPERATOR_SPECS[operator].uses_base else None, *members[:2])
        torch.testing.assert_close(
            tensor, two_way("slerp", None, inner, members[2], weight=1 / 3), rtol=1e-5, atol=1e-6
        )


def test_rounded_intermediates_are_the_merge_step_by_step_on_disk(zoo, tmp_path):
    steps = (MergeStep("m0", "m1", LINEAR), MergeStep("#1", "m2", make_arm("slerp"), 0.25))
    dtypes = {spec.dtype for ref in zoo.checkpoints for spec in TensorReader(ref).specs.values()}
    if len(dtypes) > 1:
        return  # mixed inputs are promoted otherwise at once than one by one
    at_once = dict(merged_tensors(resolve_plan(MergePlan(steps, intermediate_dtype="out"), zoo)))
    first = write_merge(resolve_plan(MergePlan(steps[:1]), zoo), tmp_path / "first").path
    second = ResolvedPlan(
        pair_plan("first", "m2", make_arm("slerp"), 0.25), (CheckpointRef("first", first), zoo.ref("m2")), zoo.base
    )
    assert all(torch.equal(at_once[name], tensor) for name, tensor in merged_tensors(second))


def contents(directory: Path) -> dict[str, bytes]:
    """All files but those that hold times."""
    kept = {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "simmerge_manifest.json"}
    manifest = json.loads((directory / "simmerge_manifest.json").read_text())
    manifest.pop("seconds")
    return kept | {"manifest": json.dumps(manifest).encode()}


class Interrupt:
    """Ctrl-C after a number of progress reports."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, done: int, total: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("operator", ["ties", "slerp", "dare_ties"])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_an_interrupted_merge_goes_on_to_the_same_bytes(catalogue, tmp_path, num_threads, operator):
    resolved = resolve_plan(pair_plan("m0", "m1", make_arm(operator)), catalogue)
    whole = write_merge(resolved, tmp_path / "whole", num_threads=num_threads)
    assert whole.num_resumed == 0
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_merge(resolved, out, progress=Interrupt(3), num_threads=num_threads)
    assert not out.exists()
    with suppress(KeyboardInterrupt):  # on a busy machine the threads may have gone on to the end before they heard
        write_merge(resolved, out, progress=Interrupt(0), num_threads=num_threads)
        shutil.rmtree(out)
    begun = (tmp_path / ".out.partial").exists()
    result = write_merge(resolved, out, num_threads=num_threads)
    assert (result.num_resumed > 0) == begun and result.fell_back == whole.fell_back
    assert contents(out) == contents(whole.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_another_plan_or_a_changed_input_begins_anew(catalogue_path, tmp_path):
    root = tmp_path / "zoo"
    shutil.copytree(catalogue_path.parent, root)
    resolved = resolve_plan(pair_plan("m0", "m1", LINEAR), load_catalogue(root / "catalogue.yaml"))
    other = resolve_plan(pair_plan("m0", "m2", LINEAR), load_catalogue(root / "catalogue.yaml"))

    def stop_and_go_on(second, change=lambda: None) -> MergeResult:
        with pytest.raises(KeyboardInterrupt):
            write_merge(resolved, tmp_path / "out", progress=Interrupt(4), num_threads=1)
        change()
        result = write_merge(second, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        return result

    assert stop_and_go_on(resolved).num_resumed >= 4
    assert stop_and_go_on(other).num_resumed == 0
    assert stop_and_go_on(resolved, lambda: os.utime(root / "m0" / "model.safetensors")).num_resumed == 0


def test_a_journal_cut_off_in_a_line_loses_that_tensor_only(catalogue, tmp_path):
    resolved = resolve_plan(pair_plan("m0", "m1", LINEAR), catalogue)
    with pytest.raises(KeyboardInterrupt):
        write_merge(resolved, tmp_path / "out", progress=Interrupt(4), num_threads=1)
    journal = tmp_path / ".out.partial" / "merge.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:7])
    assert write_merge(resolved, tmp_path / "out").num_resumed == 3


def test_nothing_is_left_after_an_error_and_foreign_directories_are_not_replaced(catalogue_path, tmp_path):
    root = tmp_path / "zoo"
    shutil.copytree(catalogue_path.parent, root)
    resolved = resolve_plan(pair_plan("m0", "m1", LINEAR), load_catalogue(root / "catalogue.yaml"))
    with pytest.raises(OutputError, match="exists and is not a merge"):
        write_merge(resolved, root / "m2")
    write_merge(resolved, tmp_path / "first")
    again = replace(load_catalogue(root / "catalogue.yaml").ref("m0"), path=tmp_path / "first")
    onto_itself = replace(resolved, checkpoints=(again, *resolved.checkpoints[1:]))
    with pytest.raises(OutputError, match="OUT .*first is also checkpoint m0, which is read"):
        write_merge(onto_itself, tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    tiny.save(tiny.make_model(num_layers=1), root / "m1")
    with pytest.raises(IncompatibleCheckpointsError):
        write_merge(resolved, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]


def test_a_full_or_read_only_target_is_named(catalogue, tmp_path, monkeypatch):
    resolved = resolve_plan(pair_plan("m0", "m1", LINEAR), catalogue)
    with pytest.raises(OutputError, match="cannot write into /proc"):
        write_merge(resolved, Path("/proc/simmerge/out"))

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("posix_fallocate", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OutputError, match="No space left on device"):
                write_merge(resolved, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(OutputError, match="GB free, the merge needs"):
            write_merge(resolved, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_target_are_refused(catalogue, tmp_path):
    resolved = resolve_plan(pair_plan("m0", "m1", LINEAR), catalogue)

    def second(done: int, total: int) -> None:
        with pytest.raises(OutputError, match="another process is writing"):
            write_merge(resolved, tmp_path / "out")

    write_merge(resolved, tmp_path / "out", progress=second)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_input_that_shrinks_meanwhile_is_named_and_nothing_is_left(catalogue_path, tmp_path):
    root = tmp_path / "zoo"
    shutil.copytree(catalogue_path.parent, root)
    resolved = resolve_plan(pair_plan("m0", "m1", LINEAR), load_catalogue(root / "catalogue.yaml"))
    graph = compile_plan(resolved)
    os.truncate(root / "m1" / "model.safetensors", 30_000)
    with pytest.raises(CheckpointError, match="'m1'.*truncated"):
        write_graph(graph, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]


@pytest.mark.parametrize("operator", ["linear", "ties", "model_stock", "slerp", "task_arithmetic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_reported_with_its_tensor_and_refused_when_strict(catalogue_path, tmp_path, operator, dtype):
    root = tmp_path / "zoo"
    shutil.copytree(catalogue_path.parent, root)
    model = tiny.make_model(seed=5)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    tiny.save(model.to(dtype), root / "m1")
    if dtype == torch.bfloat16:
        for name in ("base", "m0"):
            tiny.save(tiny.make_model().to(dtype), root / name)
    resolved = resolve_plan(pair_plan("m0", "m1", make_arm(operator)), load_catalogue(root / "catalogue.yaml"))
    with pytest.raises(CheckpointError, match="NaN or infinity in model.layers.1.mlp.up_proj.weight"):
        write_merge(resolved, tmp_path / "out", strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]
    result = write_merge(resolved, tmp_path / "out")
    assert result.not_finite == ("model.layers.1.mlp.up_proj.weight",)
    assert "1 tensors hold NaN or infinity" in (result.path / "README.md").read_text()


def test_fallbacks_of_slerp_are_reported_without_and_with_a_merge(catalogue, tmp_path):
    close = resolve_plan(pair_plan("m0", "m1", make_arm("slerp", {"threshold": 0.5})), catalogue)
    apart = resolve_plan(pair_plan("m0", "m1", make_arm("slerp", {"threshold": 1.0})), catalogue)
    names = {name for name, _ in merged_tensors(close)}
    result = write_merge(close, tmp_path / "close")
    assert set(result.fell_back[1]) == names
    linear = dict(merged_tensors(resolve_plan(pair_plan("m0", "m1", LINEAR), catalogue)))
    assert all(torch.equal(linear[name], tensor) for name, tensor in merged_tensors(close))  # identical arms
    assert write_merge(apart, tmp_path / "apart").fell_back == {}
    graph = compile_plan(close)
    computer = Computer(graph, {key: TensorSource(ref) for key, ref in graph.checkpoints.items()}, Seeds(graph))
    assert {output.name for output in graph.outputs if computer.fallbacks(output)} == names


def test_a_plan_whose_spherical_steps_fall_back_everywhere_has_the_form_of_a_linear_one(catalogue):
    close, apart = make_arm("slerp", {"threshold": 0.5}), make_arm("slerp", {"threshold": 1.0})

    def form(*steps: MergeStep) -> MergePlan:
        return linear_form(resolve_plan(MergePlan(steps), catalogue))

    assert form(MergeStep("m0", "m1", close, 0.3)) == pair_plan("m0", "m1", LINEAR, 0.3)
    for arm in (apart, make_arm("nuslerp"), LINEAR, make_arm("ties")):
        assert form(MergeStep("m0", "m1", arm)) == pair_plan("m0", "m1", arm)
    ties = make_arm("ties", {"trim_scope": "global"})
    steps = (MergeStep("m0", "m1", ties), MergeStep("#1", "m2", close), MergeStep("#2", "m1", apart))
    assert form(*steps).steps == (steps[0], MergeStep("#1", "m2", LINEAR), steps[2])


def test_a_recipe_on_an_arc_that_is_straight_everywhere_has_the_form_of_a_linear_one(catalogue):
    def of(arm) -> MergePlan:
        return MergePlan(recipe=recipe_of(arm, {"m1": 0.9, "m0": (0.2, 0.4)}))

    def form(arm) -> MergePlan:
        return linear_form(resolve_plan(of(arm), catalogue))

    assert form(make_arm("slerp", {"threshold": 0.5})) == of(LINEAR)
    for arm in (make_arm("slerp", {"threshold": 1.0}), make_arm("nuslerp"), LINEAR, make_arm("ties")):
        assert form(arm) == of(arm)


def test_the_number_of_threads_and_shards_changes_no_weight(catalogue, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    resolved = resolve_plan(pair_plan("m0", "m1", make_arm("ties")), catalogue)
    whole = write_merge(resolved, tmp_path / "whole", num_threads=1).path
    parts = write_merge(resolved, tmp_path / "parts", num_threads=4, max_shard_bytes=60_000).path
    assert len(list(parts.glob("model-*.safetensors"))) > 2
    models = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (whole, parts)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    tokens = [AutoTokenizer.from_pretrained(path)("a+1").input_ids for path in (whole, parts)]
    assert tokens[0] == tokens[1]


def test_the_directory_says_what_it_is(catalogue, tmp_path):
    resolved = resolve_plan(pair_plan("m0", "m1", make_arm("ties", {"density": 0.2})), catalogue)
    seen: list[tuple[int, int]] = []
    result = write_merge(resolved, tmp_path / "out", {"add": {"utility": 0.5, "sd": 0.1}}, lambda *x: seen.append(x))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1] == (result.num_bytes,) * 2
    manifest = json.loads((result.path / "simmerge_manifest.json").read_text())
    assert set(manifest["inputs"]) == {"checkpoint m0", "checkpoint m1", "checkpoint base"}
    assert "numpy" in manifest["versions"] and manifest["config"]["steps"][0]["operator"] == "ties"
    assert read_plan(result.path / "simmerge_plan.json")[0].plan == resolved.plan
    card = (result.path / "README.md").read_text()
    assert "base_model" not in card and "| add | 0.500 | 0.100 |" in card  # of directories nobody else has a name
    assert json.loads((result.path / "config.json").read_text())["dtype"] == "float32"


def test_licences_of_parents_are_taken_over_or_their_conflict_is_said(catalogue_path, tmp_path):
    root = tmp_path / "zoo"
    shutil.copytree(catalogue_path.parent, root)
    resolved = resolve_plan(pair_plan("m0", "m1", LINEAR), load_catalogue(root / "catalogue.yaml"))
    for name, licence in (("m0", "apache-2.0"), ("m1", "apache-2.0")):
        (root / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n# {name}\n")
    card = (write_merge(resolved, tmp_path / "same").path / "README.md").read_text()
    assert "license: apache-2.0" in card and "differ" not in card
    (root / "m1" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    card = (write_merge(resolved, tmp_path / "other").path / "README.md").read_text()
    assert "licences differ (m0: apache-2.0, m1: cc-by-nc-4.0)" in card and "\nlicense:" not in card


def test_integer_tensors_are_copied_and_must_agree(catalogue_path, tmp_path):
    root = tmp_path / "zoo"
    shutil.copytree(catalogue_path.parent, root)

    def add_counter(name: str, last: int) -> None:
        file = root / name / "model.safetensors"
        tensors = load_file(file) | {"model.counter": torch.tensor([1, 2, last])}
        save_file(tensors, file, metadata={"format": "pt"})

    for name in ("base", "m0", "m1", "m2"):
        add_counter(name, 3)
    resolved = resolve_plan(pair_plan("m0", "m1", LINEAR), load_catalogue(root / "catalogue.yaml"))
    assert dict(merged_tensors(resolved))["model.counter"].tolist() == [1, 2, 3]
    add_counter("m1", 4)
    with pytest.raises(CheckpointError, match="model.counter differs between 'm0' and 'm1'"):
        write_merge(resolved, tmp_path / "out")


def test_one_checkpoint_as_it_is(zoo):
    ref = zoo.checkpoints[0]
    reader = TensorReader(ref)
    assert all(torch.equal(tensor, reader.read(name)) for name, tensor in merged_tensors(unmerged(ref)))


def test_no_tensor_is_copied_for_the_stream(catalogue):
    for _, tensor in merged_tensors(resolve_plan(pair_plan("m0", "m1", LINEAR), catalogue)):
        assert isinstance(tensor.numpy(), np.ndarray) and tensor.is_contiguous()


def test_a_failure_of_the_machinery_loses_nothing(catalogue, tmp_path):
    graph = compile_plan(resolve_plan(pair_plan("m0", "m1", LINEAR), catalogue))

    def lost(graph, partial, placements, progress, total) -> None:
        write_tensors(graph, partial, placements[:4], JOURNAL)
        raise ConnectionError("a worker was lost")

    with pytest.raises(ConnectionError):
        write_graph(graph, tmp_path / "out", WriteOptions(runner=lost))
    assert not (tmp_path / "out").exists()
    assert write_graph(graph, tmp_path / "out").num_resumed == 4


def test_what_a_kill_between_two_renames_left_is_in_nobody_s_way(catalogue, tmp_path):
    resolved = resolve_plan(pair_plan("m0", "m1", LINEAR), catalogue)
    whole = contents(write_merge(resolved, tmp_path / "out").path)
    (tmp_path / "out").rename(tmp_path / ".out.old.partial")
    for _ in range(2):
        assert contents(write_merge(resolved, tmp_path / "out").path) == whole
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
