"""TIES trimmed over the whole model: the kept entries are the largest of all tensors, whoever makes the merge."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from simmerge_ray.base.errors import PlanError
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.engine import kernels
from simmerge_ray.merging.engine.global_trims import global_steps, resolve_global_trims
from simmerge_ray.merging.in_memory import merged_tensors
from simmerge_ray.merging.request import read_request
from simmerge_ray.merging.write.directory import write_graph, write_merge
from simmerge_ray.merging.write.output import WriteOptions
from simmerge_ray.merging.write.tensors import write_tensors
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, MergeStep, fold_plan, pair_plan, resolve_plan, write_plan
from simmerge_ray.plans.recipe import GroupWeights, Recipe
from tests import reference, tiny
from tests.operators import two_way
from tests.readers import TensorReader

GLOBAL = make_arm("ties", {"density": 0.2, "trim_scope": "global"})
# The engine's float32 arithmetic, then one rounding to the output's dtype.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 1000)
    monkeypatch.setattr(kernels, "PAIR_BLOCK", 1500)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def zoo(request, tmp_path_factory) -> Catalogue:
    """Checkpoints in which a tensor has much larger task vectors than the others, and many equal magnitudes."""
    root = tmp_path_factory.mktemp(request.param)
    path = tiny.make_catalogue(root)
    for name in ("base", "m0", "m1", "m2"):
        file = root / name / "model.safetensors"
        tensors = {key: value.bfloat16().to(getattr(torch, request.param)) for key, value in load_file(file).items()}
        if name != "base":
            tensors["model.norm.weight"] += 3.0
        save_file(tensors, file, metadata={"format": "pt"})
    return load_catalogue(path)


def read_all(ref: CheckpointRef) -> dict[str, np.ndarray]:
    reader = TensorReader(ref)
    return {name: reader.read(name).double().numpy() for name in reader.specs}


def expected_merge(base, tensors, weights, density, scale=1.0):
    """By the definition, in float64: sort all entries of a task vector, keep the first int(density * n)."""
    names = sorted(base)
    trimmed = []
    for one in tensors:
        vectors = {name: (one[name].astype(np.float32) - base[name].astype(np.float32)) for name in names}
        trimmed.append(reference.trimmed_together([vectors[name] for name in names], density))
    merged = {}
    for number, name in enumerate(names):
        parts = [w * part[number].astype(np.float64) for w, part in zip(weights, trimmed, strict=True)]
        sign = np.where(sum(parts) >= 0, 1.0, -1.0)
        agree = [part * sign > 0 for part in parts]
        divisor = sum(w * flags for w, flags in zip(weights, agree, strict=True))
        total = sum(part * flags for part, flags in zip(parts, agree, strict=True))
        merged[name] = base[name] + scale * total / np.where(divisor == 0, 1.0, divisor)
    return merged


# Weights with exact products, so that a sum that is zero elects plus in any precision.
@pytest.mark.parametrize(("density", "weight"), [(0.2, 0.5), (0.7, 0.25), (1.0, 0.5), (1e-6, 0.5)])
def test_a_pair_keeps_the_largest_entries_of_the_whole_model(zoo, density, weight):
    plan = pair_plan("m0", "m1", make_arm("ties", {"density": density, "trim_scope": "global"}), weight)
    resolved = resolve_plan(plan, zoo)
    weights = [2 * (1 - weight), 2 * weight]
    base = read_all(zoo.base)
    expected = expected_merge(base, [read_all(ref) for ref in resolved.checkpoints], weights, density)
    for name, tensor in merged_tensors(resolved):
        torch.testing.assert_close(
            tensor.double(), torch.from_numpy(expected[name]), rtol=TOLERANCE[tensor.dtype], atol=2e-7
        )


@pytest.mark.parametrize("weights", [(1.0, 0.5, 0.25), (0.5, 0.5), (1.5, 0.0, 0.5), (0.75,)])
def test_a_recipe_keeps_the_largest_entries_of_every_member_of_the_whole_model(zoo, weights):
    members = ("m2", "m0", "m1")[: len(weights)]
    arm = make_arm("ties", {"density": 0.3, "trim_scope": "global", "scale": 1.5})
    resolved = resolve_plan(MergePlan(recipe=Recipe(arm, members, weights)), zoo)
    base = read_all(zoo.base)
    expected = expected_merge(base, [read_all(zoo.ref(name)) for name in members], weights, 0.3, 1.5)
    for name, tensor in merged_tensors(resolved):
        torch.testing.assert_close(
            tensor.double(), torch.from_numpy(expected[name]), rtol=TOLERANCE[tensor.dtype], atol=2e-7
        )


def test_a_recipe_whose_weights_are_groups_has_the_thresholds_of_one_whose_weights_are_numbers(zoo):
    groups = GroupWeights((("layers.0.", 0.25),), 1.0)
    found = {
        key: dict(merged_tensors(resolve_plan(MergePlan(recipe=Recipe(GLOBAL, ("m0", "m1"), (weight, 0.5))), zoo)))
        for key, weight in (("groups", groups), ("in", 0.25), ("out", 1.0))
    }
    for name, tensor in found["groups"].items():
        assert torch.equal(tensor, found["in" if "layers.0." in name else "out"][name])


def test_it_is_another_merge_than_trimming_every_tensor(zoo):
    one, other = (
        dict(merged_tensors(resolve_plan(pair_plan("m0", "m1", arm), zoo)))
        for arm in (GLOBAL, make_arm("ties", {"density": 0.2}))
    )
    base = TensorReader(zoo.base)
    name = "model.norm.weight"
    kept = [int((merged[name] != base.read(name)).sum()) for merged in (one, other)]
    assert kept[0] == one[name].numel() > kept[1]


def test_any_number_of_threads_a_split_and_the_stream_make_the_same_bytes(zoo, tmp_path):
    plan = fold_plan(("m0", "m1", "m2"), [GLOBAL])
    resolved = resolve_plan(plan, zoo)
    whole = write_merge(resolved, tmp_path / "one", num_threads=1).path / "model.safetensors"
    parallel = write_merge(resolved, tmp_path / "many", num_threads=3).path / "model.safetensors"
    assert parallel.read_bytes() == whole.read_bytes()

    def in_two_shares(graph, partial, placements, progress, total) -> None:
        for number in (0, 1):
            write_tensors(graph, partial, placements[number::2], f"merge.journal.{number}", num_threads=1)

    write_graph(compile_plan(resolved), tmp_path / "shares", WriteOptions(runner=in_two_shares))
    assert (tmp_path / "shares" / "model.safetensors").read_bytes() == whole.read_bytes()
    written = TensorReader(CheckpointRef("one", tmp_path / "one"))
    assert all(torch.equal(tensor, written.read(name)) for name, tensor in merged_tensors(resolved))


@pytest.mark.parametrize("inner", ["linear", "slerp", "breadcrumbs", "ties"])
def test_a_step_on_the_result_of_another_trims_what_comes_out_of_it(catalogue, inner):
    arm = GLOBAL if inner == "ties" else make_arm(inner)
    steps = (MergeStep("m0", "m1", arm), MergeStep("#1", "m2", GLOBAL, 1 / 3))
    resolved = resolve_plan(MergePlan(steps), catalogue)
    base, *members = (read_all(ref) for ref in (catalogue.base, *resolved.checkpoints))
    first = dict(merged_tensors(resolve_plan(MergePlan(steps[:1]), catalogue)))
    middle = {name: tensor.double().numpy() for name, tensor in first.items()}
    expected = expected_merge(base, [middle, members[2]], [4 / 3, 2 / 3], 0.2)
    for name, tensor in merged_tensors(resolved):
        torch.testing.assert_close(tensor.double(), torch.from_numpy(expected[name]), rtol=2e-6, atol=2e-7)


def test_a_step_after_it_takes_its_result(catalogue):
    steps = (MergeStep("m0", "m1", GLOBAL), MergeStep("#1", "m2", make_arm("slerp"), 1 / 3))
    first = dict(merged_tensors(resolve_plan(MergePlan(steps[:1]), catalogue)))
    last = TensorReader(catalogue.ref("m2"))
    for name, tensor in merged_tensors(resolve_plan(MergePlan(steps), catalogue)):
        expected = two_way("slerp", None, first[name], last.read(name), weight=1 / 3)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_thresholds_keep_exactly_the_count_and_the_first_of_equal_entries(zoo):
    resolved = resolve_plan(pair_plan("m0", "m1", GLOBAL), zoo)
    graph = resolve_global_trims(compile_plan(resolved), num_threads=2)
    assert global_steps(graph) == [] and resolve_global_trims(graph, 1) is graph
    base, *members = (read_all(ref) for ref in (zoo.base, *resolved.checkpoints))
    num_entries = sum(value.size for value in base.values())
    for number, member in enumerate(members):
        kept, spent = 0, False
        for output in graph.outputs:
            params = dict(output.node.params)
            threshold, budget = params["thresholds"][number], params["budgets"][number]
            vector = np.abs(member[output.name].astype(np.float32) - base[output.name].astype(np.float32))
            num_equal = int((vector == np.float32(threshold)).sum())
            assert budget <= num_equal and not (spent and budget)
            spent |= budget < num_equal
            kept += int((vector > np.float32(threshold)).sum()) + budget
        assert kept == int(0.2 * num_entries)


def test_a_mergekit_file_of_three_models_takes_it_and_says_that_mergekit_cannot(catalogue_path, catalogue, tmp_path):
    root = catalogue_path.parent
    models = [{"model": str(root / f"m{i}"), "parameters": {"weight": w}} for i, w in enumerate((0.5, 0.3, 0.2))]
    config = {"merge_method": "ties", "base_model": str(root / "base"), "models": models}
    config["parameters"] = {"density": 0.3, "trim_scope": "global", "lambda": 0.7}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config))
    request = read_request(tmp_path / "merge.yml", tmp_path / "out")
    lines = request.lines(1 << 30, 1)
    assert "mergekit has no words for this plan" in lines
    assert "trim     step 1 over the whole model: its inputs are read twice before" in lines
    request.write(WriteOptions(num_threads=2))
    assert not (tmp_path / "out" / "mergekit_config.yml").exists()
    base, *members = (read_all(ref) for ref in (catalogue.base, *catalogue.checkpoints))
    expected = expected_merge(base, members, [0.5, 0.3, 0.2], 0.3, scale=0.7)
    written = read_all(CheckpointRef("out", tmp_path / "out"))
    for name, value in written.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-6, atol=2e-7)


def test_a_plan_file_keeps_it(catalogue, tmp_path):
    resolved = resolve_plan(pair_plan("m0", "m1", GLOBAL), catalogue)
    write_plan(tmp_path / "plan.json", resolved)
    assert json.loads((tmp_path / "plan.json").read_text())["steps"][0]["parameters"]["trim_scope"] == "global"
    request = read_request(tmp_path / "plan.json", tmp_path / "out")
    assert request.resolved is not None and request.resolved.plan == resolved.plan
    request.write(WriteOptions(num_threads=1))
    assert not (tmp_path / "out" / "mergekit_config.yml").exists()


def test_what_cannot_be_trimmed_together_is_refused_before_weights_are_read(catalogue_path, tmp_path):
    root = catalogue_path.parent
    models = [{"model": str(root / name), "parameters": {"weight": 0.5}} for name in ("m0", "m1")]
    config = {"merge_method": "ties", "base_model": str(root / "base"), "models": models}
    for change, message in (
        ({"parameters": {"density": [0.2, 0.5], "trim_scope": "global"}}, "step 1: .* one density for all tensors"),
        ({"parameters": {"trim_scope": "global"}, "dtype": "float64"}, "step 1: .*computed in float64"),
        ({"parameters": {"trim_scope": "model"}}, "parameters.trim_scope: 'model' is not one of tensor, global"),
        ({"parameters": {"trim_scope": 1}}, "parameters.trim_scope: a word is needed, got 1"),
    ):
        (tmp_path / "merge.yml").write_text(yaml.safe_dump(config | change))
        with pytest.raises(PlanError, match=message):
            read_request(tmp_path / "merge.yml", tmp_path / "out")
