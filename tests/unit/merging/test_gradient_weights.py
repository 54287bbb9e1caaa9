"""Weights that change with depth: the bytes of the plan's mergekit file, and what else reads a step's weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simmerge_ray.base.errors import PlanError
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.engine.fallbacks import all_linear, linear_form
from simmerge_ray.merging.graph import Apply
from simmerge_ray.merging.in_memory import merged_tensors
from simmerge_ray.merging.mergekit import compile_mergekit, read_mergekit, write_mergekit
from simmerge_ray.merging.write.card import model_card
from simmerge_ray.merging.write.directory import write_graph, write_merge
from simmerge_ray.plans.operators.specs import make_arm, parse_arm
from simmerge_ray.plans.plan import MergePlan, MergeStep, ResolvedPlan, pair_plan, read_plan, resolve_plan, write_plan
from tests import tiny

LAYERS = 7
NAMES = ("base", "m0", "m1", "m2")
WEIGHT = (0.1, 0.7, 0.3)
ARMS = [
    "linear", "slerp", "nuslerp", "nuslerp(row_wise=true)", "ties(density=0.2)",
    "task_arithmetic(scale=0.7)", "multislerp", "breadcrumbs",
]  # fmt: skip


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float64"])
def zoo(request, tmp_path_factory) -> Catalogue:
    """Seven layers, which round; in float64 a weight that is another by its last bit changes the merge."""
    root = tmp_path_factory.mktemp(request.param)
    path = tiny.make_catalogue(root)
    for seed, name in enumerate(NAMES):
        model = tiny.make_model(num_layers=LAYERS, hidden_size=16)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        tiny.save(model, root / name)
        tensors = load_file(root / name / "model.safetensors")
        tensors = {key: value.to(getattr(torch, request.param)) for key, value in tensors.items()}
        save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})
    return load_catalogue(path)


def theirs(resolved: ResolvedPlan, out: Path) -> bytes:
    """The merge of the plan's mergekit file, read as a file of any user is."""
    documents = read_mergekit(write_mergekit(resolved), out.parent)
    graph = compile_mergekit(documents, lambda name: CheckpointRef(name.path.name, name.path), round_intermediates=True)
    return (write_graph(graph, out).path / "model.safetensors").read_bytes()


def ours(resolved: ResolvedPlan, out: Path) -> bytes:
    return (write_merge(resolved, out).path / "model.safetensors").read_bytes()


def check_streamed(resolved: ResolvedPlan, written: Path) -> None:
    found = load_file(written / "model.safetensors")
    streamed = dict(merged_tensors(resolved))
    assert streamed.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in streamed.items())


@pytest.mark.slow
@pytest.mark.parametrize("text", ARMS)
def test_a_gradient_merges_to_the_bytes_of_its_mergekit_file(zoo, tmp_path, text):
    resolved = resolve_plan(pair_plan("m1", "m0", parse_arm(text), WEIGHT), zoo)
    written = ours(resolved, tmp_path / "ours")
    assert written == theirs(resolved, tmp_path / "theirs")
    assert written != ours(resolve_plan(pair_plan("m1", "m0", parse_arm(text), 0.3), zoo), tmp_path / "number")
    check_streamed(resolved, tmp_path / "ours")
    # What is kept beside the weights makes them again.
    assert (tmp_path / "ours" / "mergekit_config.yml").read_text() == write_mergekit(resolved)


@pytest.mark.parametrize("intermediate", ["float32", "out"])
def test_a_plan_of_several_gradients_is_several_documents(zoo, tmp_path, intermediate):
    steps = (
        MergeStep("m0", "m1", make_arm("ties", {"density": 0.2}), (0.2, 0.9)),
        MergeStep("#1", "m2", make_arm("slerp"), (0.0, 0.5, 0.25, 1.0)),
        MergeStep("m1", "#2", make_arm("task_arithmetic", {"scale": 0.7}), (0.6, 0.1, 0.3)),
    )
    resolved = resolve_plan(MergePlan(steps, intermediate_dtype=intermediate), zoo)
    assert ours(resolved, tmp_path / "ours") == theirs(resolved, tmp_path / "theirs")


def weights(resolved: ResolvedPlan) -> dict[str, tuple[float, ...]]:
    nodes = {output.name: output.node for output in compile_plan(resolved).outputs}
    assert all(isinstance(node, Apply) for node in nodes.values())
    return {name: node.weights for name, node in nodes.items()}


def test_anchors_are_spread_over_the_layers_and_the_first_holds_elsewhere(zoo):
    found = weights(resolve_plan(pair_plan("m0", "m1", make_arm("linear"), (0.0, 0.5, 0.2)), zoo))
    for layer, expected in enumerate((0.0, 1 / 6, 1 / 3, 0.5, 0.4, 0.3, 0.2)):
        assert found[f"model.layers.{layer}.mlp.up_proj.weight"] == pytest.approx((1 - expected, expected))
    assert found["model.embed_tokens.weight"] == found["model.norm.weight"] == (1.0, 0.0)


@pytest.mark.parametrize("text", ["linear", "slerp"])
def test_at_the_ends_a_gradient_keeps_the_parents(zoo, text):
    resolved = resolve_plan(pair_plan("m0", "m1", parse_arm(text), (0.0, 1.0)), zoo)
    merged = dict(merged_tensors(resolved))
    m0, m1 = (load_file(zoo.ref(name).path / "model.safetensors") for name in ("m0", "m1"))
    for name, tensor in merged.items():
        last = f"layers.{LAYERS - 1}." in name
        if last or "layers" not in name or "layers.0." in name:
            torch.testing.assert_close(tensor, (m1 if last else m0)[name], rtol=1e-6, atol=1e-7)
        else:
            assert not torch.equal(tensor, m0[name]) and not torch.equal(tensor, m1[name])


def test_a_trim_over_the_whole_model_has_the_thresholds_of_any_weight(zoo, tmp_path):
    text = "ties(density=0.2, trim_scope=global)"
    resolved = resolve_plan(pair_plan("m0", "m1", parse_arm(text), (0.25, 0.75)), zoo)
    if read_headers(zoo.ref("m0"))["model.norm.weight"].dtype == "F64":
        with pytest.raises(PlanError, match="is computed in float64; use trim_scope: tensor"):
            ours(resolved, tmp_path / "out")
        return
    ours(resolved, tmp_path / "out")
    check_streamed(resolved, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in (("model.layers.0.mlp.up_proj.weight", 0.25), ("model.layers.6.mlp.up_proj.weight", 0.75)):
        number = dict(merged_tensors(resolve_plan(pair_plan("m0", "m1", parse_arm(text), weight), zoo)))
        assert torch.equal(merged[name], number[name])
    with pytest.raises(PlanError, match="trim_scope"):
        write_mergekit(resolved)


def test_spherical_steps_as_linear_keep_their_gradient(zoo):
    plan = pair_plan("m0", "m1", make_arm("slerp"), WEIGHT)
    linear = pair_plan("m0", "m1", make_arm("linear"), WEIGHT)
    assert all_linear(plan) == linear
    same = pair_plan("m0", "m0copy", make_arm("slerp"), WEIGHT)
    copy = CheckpointRef("m0copy", zoo.ref("m0").path)
    is_float64 = read_headers(zoo.ref("m0"))["model.norm.weight"].dtype == "F64"  # stays as it is
    found = linear_form(ResolvedPlan(same, (zoo.ref("m0"), copy), None))
    assert found == (same if is_float64 else all_linear(same))


def test_mergekit_has_no_words_for_a_gradient_of_an_operator_without_weights(zoo):
    resolved = resolve_plan(pair_plan("m0", "m1", make_arm("karcher"), (0.25, 0.5)), zoo)
    with pytest.raises(PlanError, match=r"karcher has no weights; \[0.25, 0.5\] cannot"):
        write_mergekit(resolved)
    assert compile_plan(resolved).mergekit is None


def test_plan_file_and_card_hold_the_anchors(zoo, tmp_path):
    resolved = resolve_plan(pair_plan("m0", "m1", make_arm("ties"), WEIGHT), zoo)
    write_plan(tmp_path / "plan.json", resolved)
    again, _ = read_plan(tmp_path / "plan.json")
    assert again.plan == resolved.plan and again.plan.id == resolved.plan.id
    card = model_card(compile_plan(resolved), None)
    assert "`ties: m0 + m1, weight=[0.1, 0.7, 0.3]`" in card and '"weight": [' in card


def test_layers_with_a_gap_are_all_merged_and_stand_where_their_numbers_say(tmp_path):
    path = tiny.make_catalogue(tmp_path)
    for name in NAMES:
        file = tmp_path / name / "model.safetensors"
        tensors = {key.replace("layers.1.", "layers.3."): value for key, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    resolved = resolve_plan(pair_plan("m0", "m1", make_arm("linear"), (0.25, 0.75)), load_catalogue(path))
    assert ours(resolved, tmp_path / "ours") == theirs(resolved, tmp_path / "theirs")
    assert weights(resolved)["model.layers.3.mlp.up_proj.weight"] == (0.25, 0.75)
