"""Plans as values and as files."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.base.errors import OperatorError, PlanError
from simmerge_ray.plans.operators.specs import make_arm, parse_arm
from simmerge_ray.plans.plan import (
    MergePlan,
    MergeStep,
    ResolvedPlan,
    fold_plan,
    pair_plan,
    pair_plans,
    plan_from_json,
    read_plan,
    resolve_plan,
    write_plan,
)
from tests.plan_space import enumerate_plans

LINEAR, TIES = make_arm("linear"), make_arm("ties", {"density": 0.2})
WEIGHTS = st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.lists(st.floats(0, 1), min_size=2, max_size=64).map(tuple)
STEPS = st.builds(
    MergeStep,
    st.sampled_from(["a", "b"]),
    st.sampled_from(["c", "d"]),
    st.sampled_from([LINEAR, TIES, make_arm("task_arithmetic", {"scale": 0.7})]),
    WEIGHTS,
)


@given(STEPS)
def test_plans_survive_json(step):
    plan = MergePlan((step,))
    again = plan_from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and (again.id, again.label) == (plan.id, plan.label)


@given(STEPS, st.integers(2, 64))
def test_equal_anchors_are_the_number(step, count):
    number = pair_plan(step.left, step.right, step.arm, step.anchors[0])
    for anchors in ((step.anchors[0],) * count, [step.anchors[0]] * count):
        plan = pair_plan(step.left, step.right, step.arm, anchors)
        assert plan == number and (plan.id, plan.label) == (number.id, number.label)


@given(STEPS, WEIGHTS)
def test_two_gradients_are_two_plans_with_two_labels(step, weight):
    one, other = MergePlan((step,)), MergePlan((MergeStep(step.left, step.right, step.arm, weight),))
    assert (one == other) == (one.id == other.id)
    if isinstance(step.weight, tuple) or isinstance(other.steps[0].weight, tuple):
        assert (one.label == other.label) == (one == other)


def test_labels_show_gradients_and_no_numbers():
    assert pair_plan("a", "b", TIES, 0.3).label == "ties(density=0.2): a + b"
    assert pair_plan("a", "b", TIES, (0, 0.5, 1.0)).label == "ties(density=0.2): a + b, weight=[0, 0.5, 1]"
    fold = MergePlan((MergeStep("a", "b", LINEAR, 0.3), MergeStep("#1", "c", LINEAR, (1 / 3, 0.5))))
    assert fold.label == "#1 = linear(a, b); #2 = linear(#1, c, weight=[0.3333333333333333, 0.5])"


def test_whole_numbers_as_anchors_have_the_id_of_their_floats():
    assert pair_plan("a", "b", LINEAR, (0, 1)).id == pair_plan("a", "b", LINEAR, (0.0, 1.0)).id


def test_a_step_knows_its_weight_at_a_depth():
    step = MergeStep("a", "b", TIES, (0.0, 0.5, 0.25))
    assert [step.weight_at(position) for position in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 0.25, 0.5, 0.375, 0.25]
    assert step.source_weights(0.75) == (1.25, 0.75) and step.anchors == (0.0, 0.5, 0.25)
    assert MergeStep("a", "b", TIES, 0.3).weight_at(0.7) == 0.3


@given(STEPS, st.floats(0, 1))
def test_weights_of_both_sources_add_up_to_that_of_a_number(step, position):
    left, right = step.source_weights(position)
    factor = 2.0 if step.arm.spec.needs_base else 1.0
    assert left + right == pytest.approx(factor) and right == pytest.approx(factor * step.weight_at(position))


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
        (
            {"steps": [{"left": "a", "right": "b", "operator": "linear", "weight": [0.1, 2]}]},
            r"step 1: weight of the right checkpoint: anchor 2: 2 is outside \[0, 1\]",
        ),
        ({"steps": [{"left": "a", "right": "b", "operator": "linear", "weight": [[0], 1]}]}, "step 1: .*anchor 1"),
        ({"steps": [{"left": "a", "right": "b", "operator": "linear", "weight": [0.5, True]}]}, "step 1: .*anchor 2"),
        ({"steps": [{"left": "a", "right": "b", "operator": "linear", "weight": [0.5]}]}, "2 to 64 anchors, got 1"),
        ({"steps": [{"left": "a", "right": "b", "operator": "linear", "weight": []}]}, "2 to 64 anchors, got 0"),
        ({"steps": [{"left": "a", "right": "b", "operator": "linear", "weight": [0.5] * 65}]}, "anchors, got 65"),
        ({"steps": [{"left": "a", "right": "b", "operator": "linear", "weight": ["x", "x"]}]}, "step 1: weight.*'x'"),
        ({"steps": [{"left": "a", "right": "a", "operator": "linear"}]}, "both 'a'"),
        ({"steps": [{"left": "#1", "right": "a", "operator": "linear"}]}, "'#1' is not an earlier step"),
        ({"steps": [{"left": "a", "right": "b", "operator": "linear"}] * 2}, "result of step #1 is not used"),
        ({"steps": ["x"]}, "step 1: expected an object"),
        ({"source": "a", "steps": []}, "non-empty"),
        ({"steps": [{"left": "a", "right": "b", "operator": "linear"}], "sed": 1}, "unknown key 'sed'.*'seed'"),
        ({"steps": [{"left": "a", "right": "b", "operator": "linear"}], "seed": 1.5}, "'seed' must be an integer"),
        ({"steps": [{"left": "a", "right": "b", "operator": "linear"}], "intermediate_dtype": "x"}, "float32, out"),
        ({"steps": [{"left": "a", "right": "b", "operator": "passthrough"}]}, "takes 1 source"),
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
    for content, message in (("{", "not JSON"), ("{}", "simmerge plan"), ("[]", "JSON object")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(PlanError, match=message):
            read_plan(tmp_path / "bad.json")


def test_a_task_vector_operator_without_a_base_is_refused_before_any_merge(catalogue):
    with pytest.raises(OperatorError, match="ties needs a base"):
        ResolvedPlan(pair_plan("m0", "m1", TIES), catalogue.checkpoints[:2], None)
    with pytest.raises(PlanError, match="unknown checkpoint 'm8'"):
        resolve_plan(pair_plan("m0", "m8", LINEAR), catalogue)


def test_every_pair_gets_every_arm():
    plans = pair_plans([("a", "b"), ("b", "c")], [LINEAR, TIES])
    assert [plan.label for plan in plans] == [
        "linear: a + b", "ties(density=0.2): a + b", "linear: b + c", "ties(density=0.2): b + c",
    ]  # fmt: skip
    assert parse_arm("ties(density=0.2)") == TIES


def effective_weights(plan: MergePlan) -> dict[str, float]:
    """What a fold of linear steps gives each member."""
    values: dict[str, dict[str, float]] = {}
    for number, step in enumerate(plan.steps, 1):
        total: dict[str, float] = {}
        for source, weight in ((step.left, 1 - step.weight), (step.right, step.weight)):
            for member, share in values.get(source, {source: 1.0}).items():
                total[member] = total.get(member, 0.0) + weight * share
        values[f"#{number}"] = total
    return values[f"#{len(plan.steps)}"]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_equal_weighting_counts_every_member_the_same_and_halving_favours_the_last(count):
    members = "abcde"[:count]
    equal, halving = fold_plan(members, [LINEAR]), fold_plan(members, [LINEAR], "halving")
    assert effective_weights(equal) == pytest.approx(dict.fromkeys(members, 1 / count))
    assert effective_weights(halving)[members[-1]] == 0.5
    assert equal.members == tuple(members) and plan_from_json(equal.to_json()) == equal


def test_a_fold_needs_members_and_arms_that_fit():
    for members, arms in (("a", [LINEAR]), ("abc", [LINEAR, TIES, TIES])):
        with pytest.raises(PlanError, match="make no plan"):
            fold_plan(members, arms)
    with pytest.raises(PlanError, match="unknown weighting 'equl'"):
        fold_plan("ab", [LINEAR], "equl")


def test_enumeration_holds_every_merge_once():
    plans = list(enumerate_plans("abcd", [LINEAR, TIES], [2, 3]))
    # Pairs: 6 x 2 arms. Triples: 24 orders, the first two commute: 12 x 2^2 arms.
    assert len(plans) == 6 * 2 + 12 * 4 == len({plan.id for plan in plans})
    # With halving only a first step of equal weights commutes, which it is there too.
    assert len(list(enumerate_plans("abc", [LINEAR], [3], "halving"))) == 3


def test_options_of_a_plan_change_its_id():
    plan = fold_plan("abc", [TIES])
    changed = [MergePlan(plan.steps, seed=1), MergePlan(plan.steps, intermediate_dtype="out")]
    assert len({plan.id, *(one.id for one in changed)}) == 3
    assert [plan_from_json(one.to_json()) for one in changed] == changed
