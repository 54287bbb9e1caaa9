"""The word on utility beside the answer of `auto`: the predictor's numbers for the right owners, or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.pipelines.auto.expected import expect
from simmerge_ray.pipelines.auto.request import AutoRun, LabelFree
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.search.objectives import Objective
from simmerge_ray.selector.finding.aim import Aim
from simmerge_ray.selector.finding.choice import Finding
from simmerge_ray.selector.finding.probed import ProbedPlan
from simmerge_ray.selector.finding.space import sum_of
from simmerge_ray.selector.finding.virtual import VirtualScores
from simmerge_ray.selector.predictor.signals import SingleValues
from simmerge_ray.selector.predictor.train import train_predictor
from simmerge_ray.signals.candidates.signatures import Owner
from tests.unit.selector.predictor.made_up import rows_of_bases

# The base's own answers to the general probes, in the middle, are nobody's task.
OWNERS = (Owner("m0", "s"), Owner("base", "general"), Owner("m1", "t"))
MERGE = sum_of([("m0", 0.7), ("m1", 0.4)])
KEPT = {
    MERGE: ([0.8, 0.1, 0.6], [0.4, 9.0, 0.8]),
    MergePlan(source="m0"): ([1.0, 0.2, 0.3], [0.1, 9.0, 1.4]),
    MergePlan(source="m1"): ([0.2, 0.3, 1.0], [1.6, 9.0, 0.15]),
    MergePlan(source="base"): ([0.4, 1.0, 0.5], [1.2, 0.0, 1.0]),
}
SCORED = VirtualScores(("m0", "m1"), np.zeros((3, 2)), {}, *(np.zeros((3, 2)) for _ in range(3)), np.zeros(3))


@pytest.fixture(scope="module")
def predictor():
    return train_predictor(rows_of_bases(), TrainConfig(model="ridge", num_folds=4))


def run_with(predictor) -> AutoRun:
    return AutoRun(None, None, Path("out"), "signatures", {}, predictor=predictor)  # type: ignore[arg-type]


def found(without: str = "") -> LabelFree:
    ranked = [
        ProbedPlan(plan, np.array(kept), np.array(nll), 24, 0.5, float(np.mean(kept)))
        for plan, (kept, nll) in KEPT.items()
        if plan.label != without
    ]
    return LabelFree(ranked[0], Finding(Aim(OWNERS, "base", Objective("mean")), tuple(ranked), SCORED, None), ())


def test_it_is_the_predictor_of_what_was_kept_without_the_general_probes(predictor):
    expected = expect(run_with(predictor), found())
    kept = np.array([KEPT[plan] for plan in expected.plans])[:, :, [0, 2]]
    singles = SingleValues(np.array([0.4, 0.5]), np.array([1.2, 1.0]), np.array([0.1, 0.15]))
    direct = predictor.predict(("s", "t"), kept[:, 0], kept[:, 1], singles)
    assert expected.predicted.tasks == ("s", "t") and (expected.predicted.utility == direct.utility).all()
    assert set(expected.plans) == set(KEPT) and expected.num_bases == 2


def test_the_answer_is_told_with_its_interval_and_that_it_was_not_chosen_by_it(predictor):
    expected = expect(run_with(predictor), found())
    (line,) = expected.lines(MERGE)
    utility = expected.predicted.utility[expected.plans.index(MERGE)]
    width = predictor.intervals.half_widths[predictor.intervals.levels.index(0.9), 0]
    assert line == (
        f"expected utility: s {utility[0]:.2f}, t {utility[1]:.2f} ± {width:.2f} at 90 %; the predictor, trained on 2 "
        "bases, has no part in the choice"
    )
    told = {one["label"]: one["utility"] for one in expected.to_json()["candidates"]}
    assert told[MERGE.label] == {task: round(float(value), 4) for task, value in zip("st", utility, strict=True)}


def test_no_number_is_said_where_nothing_is_known(predictor):
    stranger = replace(predictor, novelty=replace(predictor.novelty, limit=-1.0))
    expected = expect(run_with(stranger), found())
    assert expected.lines(MERGE) == [
        "no utility is predicted on s, t: the predictor, trained on 2 bases, has seen no merge like this one"
    ]
    assert all(value is None for one in expected.to_json()["candidates"] for value in one["utility"].values())


@pytest.mark.parametrize("without", ["base", "m1"])
def test_nothing_is_expected_where_a_checkpoint_could_not_be_run(predictor, without):
    assert expect(run_with(predictor), found(without)) is None
