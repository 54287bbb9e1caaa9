"""Which tuned merge is the answer: planted figures on the probes that were held out."""

from __future__ import annotations

import numpy as np
import pytest

from simmerge_ray.base.config import TuneConfig
from simmerge_ray.pipelines.auto.find import _beside_tuned
from simmerge_ray.pipelines.auto.request import Tuned
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import Recipe
from simmerge_ray.search.objectives import Objective
from simmerge_ray.selector.finding.aim import Aim
from simmerge_ray.selector.finding.choice import Finding
from simmerge_ray.selector.finding.probed import ProbedPlan
from simmerge_ray.signals.candidates.signatures import Owner

AIM = Aim((Owner("a", "s"), Owner("b", "t")), "base", Objective("mean"))
KEEP = MergePlan(source="a")
FIRST, SECOND = (
    MergePlan(recipe=Recipe(make_arm("task_arithmetic"), ("a", "b"), (0.5, weight))) for weight in (0.5, 0.6)
)


def probed(plan: MergePlan, retention: tuple[float, float], nll: tuple[float, float]) -> ProbedPlan:
    of_owners = np.array(retention), np.array(nll)
    score = float(AIM.scores(*(one[None] for one in of_owners))[0])
    return ProbedPlan(plan, *of_owners, 16, score, float(AIM.pooled(of_owners[0][None])[0]))


class Planted:
    """Keeps of every probe what is planted."""

    parts = (16,)

    def __init__(self, *known: ProbedPlan) -> None:
        self._known = {one.plan: one for one in known}

    def probe(self, plans, bounds, chosen=None):
        return [self._known[plan] for plan in plans]


ONE_WHOLE = probed(KEEP, (1.0, 0.0), (0.0, 9.0))  # a checkpoint as it is: all of its own answers, none of the other's
HALF_OF_ALL = probed(FIRST, (0.4, 0.3), (0.3, 0.3))  # likely tokens, few whole answers
MORE = probed(SECOND, (0.7, 0.6), (0.4, 0.4))


def test_a_tuned_merge_must_keep_as_many_answers_whole():
    assert HALF_OF_ALL.score > ONE_WHOLE.score and HALF_OF_ALL.kept < ONE_WHOLE.kept
    assert not Tuned(HALF_OF_ALL, HALF_OF_ALL, ONE_WHOLE).is_better
    assert Tuned(MORE, MORE, ONE_WHOLE).is_better
    assert not Tuned(ONE_WHOLE, ONE_WHOLE, ONE_WHOLE).is_better


@pytest.mark.parametrize(("tuned", "answer"), [((HALF_OF_ALL,), KEEP), ((HALF_OF_ALL, MORE), SECOND), ((), KEEP)])
def test_the_answer_is_the_best_of_those_that_are_better(tuned, answer):
    finding = Finding(AIM, (ONE_WHOLE,), None, None)
    found = _beside_tuned(Planted(ONE_WHOLE, *tuned), finding, [one.plan for one in tuned], TuneConfig())
    assert found.best.plan == answer and len(found.tuned) == len(tuned)


def test_kept_is_the_objective_of_retention_alone():
    weighted = Aim(AIM.owners, "base", Objective("s=3,t=1", weights=(("s", 3.0), ("t", 1.0))))
    retention = np.array([[1.0, 0.2]])
    assert AIM.pooled(retention)[0] == pytest.approx(0.6) and weighted.pooled(retention)[0] == pytest.approx(0.8)
    assert Aim(AIM.owners, "base", Objective("worst")).pooled(retention)[0] == pytest.approx(0.2)
