"""Plans as values and as files, and the checkpoints they make."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.catalogue import load_catalogue
from simmerge_ray.checkpoints import CheckpointRef, TensorReader, checkpoint_digest
from simmerge_ray.errors import CheckpointError, IncompatibleCheckpointsError, OperatorError, PlanError
from simmerge_ray.merging import merge_tensor, merged_tensors, write_merge
from simmerge_ray.operators.specs import OPERATOR_SPECS, make_arm, parse_arm
from simmerge_ray.operators.table import OPERATORS
from simmerge_ray.plans import (
    MergePlan,
    MergeStep,
    ResolvedPlan,
    pair_plan,
    pair_plans,
    plan_from_json,
    read_plan,
    resolve_plan,
    unmerged,
    write_plan,
)
from tests import tiny

LINEAR, TIES = make_arm("linear"), make_arm("ties", {"density": 0.2})
STEPS = st.builds(
    MergeStep,
    st.sampled_from(["a", "b"]),
    st.sampled_from(["c", "d"]),
    st.sampled_from([LINEAR, TIES, make_arm("task_arithmetic", {"scale": 0.7})]),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)


@given(STEPS)
def test_plans_survive_json(step):
    plan = MergePlan((step,))
    assert plan_from_json(json.loads(json.dumps(plan.to_json()))) == plan


@given(STEPS)
def test_commuting_sources_do_not_change_the_id_and_others_do(step):
    swapped = MergePlan((MergeStep(step.right, step.left, step.arm, step.weight),))
    assert (swapped.id == MergePlan((step,)).id) == (step.weight == 0.5)


def test_a_plan_of_two_steps_knows_its_members_and_needs():
    plan = MergePlan((MergeStep("a", "b", LINEAR), MergeStep("#1", "c", TIES, 1 / 3)))
    assert plan.members == ("a", "b", "c")
    assert plan.needs_base and not MergePlan(plan.steps[:1]).needs_base
    assert plan_from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "object with 'steps'"),
        ({"steps": []}, "non-empty"),
        ({"steps": [{"left": "a", "right": "b"}]}, "step 1: 'operator' must be a string"),
        ({"steps": [{"left": "a", "right": "b", "operator": "liner"}]}, "unknown operator 'liner'"),
        ({"steps": [{"left": "a", "right": "b", "operator": "linear", "wieght": 1}]}, "did you mean 'weight'"),
        ({"steps": [{"left": "a", "right": "b", "operator": "linear", "weight": 2}]}, "step 1: weight"),
        ({"steps": [{"left": "a", "right": "a", "operator": "linear"}]}, "both 'a'"),
        ({"steps": [{"left": "#1", "right": "a", "operator": "linear"}]}, "'#1' is not an earlier step"),
        ({"steps": [{"left": "a", "right": "b", "operator": "linear"}] * 2}, "result of step #1 is not used"),
        ({"steps": ["x"]}, "step 1: expected an object"),
        ({"source": "a", "steps": []}, "non-empty"),
    ],
)
def test_malformed_plans_are_refused_with_the_step(value, message):
    with pytest.raises((PlanError, OperatorError), match=message):
        plan_from_json(value)


def test_plan_files_are_read_back_with_relative_paths(catalogue, tmp_path):
    resolved = resolve_plan(pair_plan("m1", "m0", TIES), catalogue)
    write_plan(tmp_path / "plan.json", resolved, {"add": {"utility": 0.5, "sd": 0.1}})
    again, predicted = read_plan(tmp_path / "plan.json")
    assert again.plan == resolved.plan and {r.path for r in again.checkpoints} == {r.path for r in resolved.checkpoints}
    assert again.base == resolved.base and predicted == {"add": {"utility": 0.5, "sd": 0.1}}
    for content, message in (("{", "not JSON"), ("{}", "simmerge plan"), ("[]", "simmerge plan")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(PlanError, match=message):
            read_plan(tmp_path / "bad.json")


def test_a_task_vector_operator_without_a_base_is_refused_before_any_merge(catalogue):
    with pytest.raises(OperatorError, match="ties needs a base"):
        ResolvedPlan(pair_plan("m0", "m1", TIES), catalogue.checkpoints[:2], None)
    with pytest.raises(PlanError, match="unknown checkpoint 'm8'"):
        resolve_plan(pair_plan("m0", "m8", LINEAR), catalogue)


@pytest.mark.parametrize("operator", OPERATOR_SPECS)
def test_the_written_checkpoint_holds_the_operator_applied_to_every_tensor(catalogue, tmp_path, operator):
    resolved = resolve_plan(pair_plan("m0", "m1", make_arm(operator)), catalogue)
    out = write_merge(resolved, tmp_path / "out", {"add": {"utility": 0.5, "sd": 0.1}})
    written = TensorReader(CheckpointRef("out", out))
    left, right, base = (TensorReader(ref) for ref in (*resolved.checkpoints, catalogue.base))
    assert written.specs.keys() == left.specs.keys()
    for name in written.specs:
        expected = OPERATORS[operator](
            base.read(name) if OPERATOR_SPECS[operator].uses_base else None, left.read(name), right.read(name)
        )
        assert torch.equal(written.read(name), expected)
    manifest = json.loads((out / "simmerge_manifest.json").read_text())
    used = (*resolved.checkpoints, *((catalogue.base,) if OPERATOR_SPECS[operator].uses_base else ()))
    assert manifest["inputs"] == {f"checkpoint {ref.id}": checkpoint_digest(ref) for ref in used}
    assert "torch" in manifest["versions"] and manifest["config"]["steps"][0]["operator"] == operator
    assert read_plan(out / "simmerge_plan.json")[0].plan == resolved.plan
    card = (out / "README.md").read_text()
    assert "base_model:\n- m0\n- m1" in card and "| add | 0.500 | 0.100 |" in card
    assert json.loads((out / "simmerge_plan.json").read_text())["steps"][0]["operator"] == operator


def test_transformers_loads_the_merge_and_sharding_does_not_change_it(catalogue, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    resolved = resolve_plan(pair_plan("m0", "m1", LINEAR), catalogue)
    whole = write_merge(resolved, tmp_path / "whole")
    parts = write_merge(resolved, tmp_path / "parts", max_shard_bytes=60_000)
    assert len(list(parts.glob("model-*.safetensors"))) > 2
    models = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (whole, parts)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert (
        AutoTokenizer.from_pretrained(whole)("a+1").input_ids == AutoTokenizer.from_pretrained(parts)("a+1").input_ids
    )


def test_progress_ends_at_all_bytes(catalogue, tmp_path):
    seen: list[tuple[int, int]] = []
    write_merge(
        resolve_plan(pair_plan("m0", "m1", LINEAR), catalogue), tmp_path / "o", progress=lambda *x: seen.append(x)
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1][0] == seen[-1][1]


def test_a_fold_needs_no_intermediate_and_keeps_the_dtype():
    sources = {
        name: torch.full((4,), value, dtype=torch.bfloat16) for name, value in (("a", 1.0), ("b", 2.0), ("c", 4.5))
    }
    plan = MergePlan((MergeStep("a", "b", LINEAR), MergeStep("#1", "c", LINEAR, 1 / 3)))
    merged = merge_tensor(plan, sources, None)
    assert merged.dtype == torch.bfloat16 and merged.tolist() == [2.5] * 4


def test_integer_tensors_are_copied_and_must_agree():
    a, b = torch.tensor([1, 2]), torch.tensor([1, 3])
    plan = pair_plan("a", "b", LINEAR)
    assert torch.equal(merge_tensor(plan, {"a": a, "b": a.clone()}, None), a)
    with pytest.raises(CheckpointError, match="'a' and 'b'"):
        merge_tensor(plan, {"a": a, "b": b}, None)


def test_one_checkpoint_as_it_is(catalogue):
    ref = catalogue.checkpoints[0]
    reader = TensorReader(ref)
    assert all(torch.equal(tensor, reader.read(name)) for name, tensor in merged_tensors(unmerged(ref)))


def test_nothing_is_left_when_a_merge_fails_and_foreign_directories_are_not_replaced(catalogue_path, tmp_path):
    root = tmp_path / "zoo"
    shutil.copytree(catalogue_path.parent, root)
    resolved = resolve_plan(pair_plan("m0", "m1", LINEAR), load_catalogue(root / "catalogue.yaml"))

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_merge(resolved, tmp_path / "out", progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]
    with pytest.raises(CheckpointError, match="exists and is not a merge"):
        write_merge(resolved, root / "m0")
    tiny.save(tiny.make_model(num_layers=1), root / "m1")
    with pytest.raises(IncompatibleCheckpointsError):
        write_merge(resolved, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]


def test_every_pair_gets_every_arm():
    plans = pair_plans([("a", "b"), ("b", "c")], [LINEAR, TIES])
    assert [plan.label for plan in plans] == [
        "linear: a + b", "ties(density=0.2): a + b", "linear: b + c", "ties(density=0.2): b + c",
    ]  # fmt: skip
    assert parse_arm("ties(density=0.2)") == TIES
