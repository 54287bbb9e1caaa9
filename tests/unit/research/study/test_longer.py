from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, MergeStep, fold_plan, pair_plan
from simmerge_ray.research.study.longer import (
    EQUAL_LINEAR,
    ORACLE,
    PREDICTED,
    MeasuredFold,
    candidates,
    choices,
    compare,
    pooled_utility,
    rank_agreement,
    resampled_interval,
    unmerged_utilities,
    weighting_of,
)
from simmerge_ray.search.labels import EvaluationSettings, LabeledPlan, Measured

LINEAR, TIES = make_arm("linear"), make_arm("ties", {"density": 0.5})
OWN = {"a": "math", "b": "code", "c": "rag"}
MEMBERS = tuple(OWN)


@pytest.fixture
def catalogue() -> Catalogue:
    refs = tuple(CheckpointRef(name, Path(name), "base") for name in OWN)
    return Catalogue(refs, OWN, CheckpointRef("base", Path("base")))


def label(plan: MergePlan, task: str, utility: float) -> LabeledPlan:
    items = np.zeros(10)
    items[: round(10 * utility)] = 1.0
    return LabeledPlan(plan, task, "t", Measured(items), EvaluationSettings("transformers", "float32", 64), {})


def singles() -> list[LabeledPlan]:
    """Experts reach 0.9 on their own task and 0.3 on the others, c 0.5; the base 0.2, and 0.7 on rag."""
    found = []
    for task in ("math", "code", "rag"):
        base = 0.7 if task == "rag" else 0.2
        found.append(label(MergePlan(source="base"), task, base))
        for name, own in OWN.items():
            utility = 0.9 if own == task else 0.5 if name == "c" else 0.3
            found.append(label(MergePlan(source=name), task, utility))
    return found


def plans() -> list[MergePlan]:
    return [
        fold_plan(("a", "b", "c"), [LINEAR]),
        fold_plan(("a", "b", "c"), [TIES]),
        fold_plan(("c", "b", "a"), [TIES]),
        fold_plan(("a", "c", "b"), [TIES, LINEAR]),
        fold_plan(("a", "c", "b"), [LINEAR, TIES]),
    ]


def labels() -> list[LabeledPlan]:
    made = [label(plan, task, 0.3 + n / 10) for n, plan in enumerate(plans()) for task in OWN.values()]
    return [*singles(), *made, label(pair_plan("a", "b", LINEAR), "math", 0.5)]


def test_weighting_is_recognised():
    for weighting in ("equal", "halving"):
        assert weighting_of(fold_plan(("c", "b", "a"), [TIES, LINEAR], weighting)) == weighting
    assert weighting_of(pair_plan("a", "b", TIES)) is None
    steps = (MergeStep("a", "b", TIES), MergeStep("#1", "c", TIES, 0.4))
    assert weighting_of(MergePlan(steps)) is None


def test_pooled_utility_leaves_out_tasks_without_range(catalogue):
    utilities = unmerged_utilities(labels())
    # math: (0.55 - 0.2) / (0.9 - 0.2) = 0.5; code: 1; rag: 0.
    pooled = pooled_utility({"math": 0.55, "code": 0.9, "rag": 0.7}, utilities, catalogue)
    assert pooled == pytest.approx((0.5 + 1 + 0) / 3)
    utilities["rag"]["base"] = 0.81
    assert pooled_utility({"math": 0.55, "code": 0.9, "rag": 0.7}, utilities, catalogue) == pytest.approx(0.75)
    assert np.isnan(pooled_utility({"rag": 0.9}, utilities, catalogue))


def test_candidates_are_measured_on_all_tasks_of_their_members(catalogue):
    assert {one.plan.id for one in candidates(labels(), catalogue)} == {plan.id for plan in plans()}
    partly = [one for one in labels() if not (one.plan.id == plans()[0].id and one.task == "rag")]
    assert {one.plan.id for one in candidates(partly, catalogue)} == {plan.id for plan in plans()[1:]}


def chosen_of(catalogue: Catalogue, predicted: dict[str, float]) -> dict[str, list[MeasuredFold]]:
    group = candidates(labels(), catalogue)
    linear = [one for one in group if one.arm == "linear"]
    return choices(group, predicted, TIES.label, unmerged_utilities(labels()), catalogue, linear)


def test_policies_take_the_plans_that_they_name(catalogue):
    ids = [plan.id for plan in plans()]
    chosen = chosen_of(catalogue, {name: float(n == 3) for n, name in enumerate(ids)})
    picked = {name: {one.plan.id for one in some} for name, some in chosen.items()}
    assert picked[PREDICTED] == {ids[3]} and picked[ORACLE] == {ids[4]} and picked[EQUAL_LINEAR] == {ids[0]}
    # c is best over all tasks; of the others a comes first by its name.
    assert picked["best fixed arm, expert last"] == {ids[1]}
    assert picked["best fixed arm, random order"] == {ids[2]}
    assert picked["random plan"] == {ids[3], ids[4]}


def test_comparison_by_hand(catalogue):
    ids = [plan.id for plan in plans()]
    chosen = chosen_of(catalogue, {name: float(n == 3) for n, name in enumerate(ids)})
    rows = {
        row["policy"]: row
        for row in compare({("base", MEMBERS, "equal"): chosen}, {"base": unmerged_utilities(labels())}, OWN)
    }
    assert rows[PREDICTED]["difference"] == 0.0
    # 0.6 on all three tasks, of which the experts reach 0.9.
    assert rows[PREDICTED]["degradation"] == pytest.approx(100 * (0.6 - 0.9) / 0.9)
    others = [(0.3 + 0.5) / 2, (0.3 + 0.5) / 2, 0.3]
    assert rows[PREDICTED]["auxiliary_gain"] == pytest.approx(100 * (1.8 - sum(others)) / sum(others))
    # The first candidate has 0.3 everywhere: 0.3 less on math and code (range 0.7) and on rag (0.2).
    assert rows[EQUAL_LINEAR]["difference"] == pytest.approx((0.3 / 0.7 + 0.3 / 0.7 + 0.3 / 0.2) / 3)


def test_interval_keeps_bases_and_subsets_together():
    units = [(f"b{n % 4}", (str(n),)) for n in range(40)]
    constant = np.array([float(unit[0][1]) for unit in units])
    low, high = resampled_interval(constant, units)
    assert low <= 0.75 and high >= 2.25  # four bases that differ and nothing inside them
    assert resampled_interval(np.ones(40), units) == [1.0, 1.0]


def test_rank_agreement(catalogue):
    group = candidates(labels(), catalogue)
    assert rank_agreement(group, {one.plan.id: one.pooled for one in group}) == pytest.approx(1.0)
    assert rank_agreement(group, {one.plan.id: -one.pooled for one in group}) == pytest.approx(-1.0)
    assert rank_agreement(group[:2], {one.plan.id: one.pooled for one in group}) is None
    assert rank_agreement(group, {one.plan.id: 0.0 for one in group}) is None
