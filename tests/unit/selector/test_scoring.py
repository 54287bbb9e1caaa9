"""GapClosed of policies: where it must lie, and that the headroom and the assessment compute the same figures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.search.headroom import Context, headroom
from simmerge_ray.selector.assessment.bench import Bench, NoiseSets
from simmerge_ray.selector.data.scoring import GAP_CLOSED, UTILITY, Scoring, keeping_no_parent, shares_of, units_of
from tests.contexts import made_context, zoos

ARMS = ("x", "y", "z")


def gap_closed(contexts: list[Context], picks: list[str]) -> float:
    """Of the policy that takes the named arm for each context, by the definition: no function of the package."""
    by_task: dict[str, list[tuple[float, float]]] = {}
    for context, arm in zip(contexts, picks, strict=True):
        directions = []
        for choosing, scoring in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
            lead = context.left_items[choosing] - context.right_items[choosing]
            error = lead.std(ddof=1) / len(lead) ** 0.5
            if abs(lead.mean()) >= max(0.10, 2 * error):
                parents = (context.left_items, context.right_items)
                expert, auxiliary = parents if lead.mean() > 0 else parents[::-1]
                floor = auxiliary[scoring].mean()
                directions.append((context.arms[arm][scoring].mean() - floor, expert[scoring].mean() - floor))
        if directions and (pair := np.mean(directions, axis=0))[1] > 0:
            by_task.setdefault(context.task, []).append((pair[0], pair[1]))
    return float(np.mean([sum(a for a, _ in rows) / sum(b for _, b in rows) for rows in by_task.values()]))


@settings(max_examples=40, deadline=None)
@given(zoos(), st.integers(0, 100))
def test_headroom_assessment_and_the_definition_agree_on_gap_closed(contexts: list[Context], seed: int) -> None:
    report, scoring = headroom(contexts, num_resamples=1), Scoring.of(contexts, ARMS)
    units = units_of(contexts, per_merge=False)
    bench = Bench(scoring, units, NoiseSets.of(contexts, ARMS, units), np.ones((1, len(scoring.rows))))
    always = [np.tile(np.eye(len(ARMS) + 2)[k], (len(contexts), 1)) for k in range(len(ARMS))]
    assert len(scoring.rows) == report.num_defined and scoring.unit == GAP_CLOSED
    for k, arm in enumerate(ARMS):
        figures = bench.measure(always[k], always[0])
        expected = pytest.approx(report.arm_gap_closed[arm], abs=1e-9)
        assert figures["gap_closed"] == scoring.fixed()[k] == gap_closed(contexts, [arm] * len(contexts)) == expected
        for task, of_task in report.per_context.tasks.items():
            assert figures["tasks"][task]["gap_closed"] == pytest.approx(of_task.arm_gap_closed[arm], abs=1e-9)
            assert figures["tasks"][task]["num_contexts"] == of_task.num_contexts
    best = ARMS[scoring.best_fixed()]
    assert report.arm_gap_closed[best] == pytest.approx(report.per_merge.best_fixed, abs=1e-9)
    picks = np.random.default_rng(seed).integers(len(ARMS), size=len(contexts))
    taken = scoring.taken(shares_of(keeping_no_parent(np.eye(len(ARMS))[picks]), units))
    assert float(scoring.headline(taken)) == pytest.approx(gap_closed(contexts, [ARMS[k] for k in picks]), abs=1e-9)


def test_gap_closed_of_a_policy_lies_where_its_arms_are() -> None:
    contexts = [
        made_context({"x": (0.8, 0.8), "y": (0.2, 0.2)}),
        made_context({"x": (0.2, 0.2), "y": (0.8, 0.8)}, names=("a", "c")),
    ]
    scoring = Scoring.of(contexts, ("x", "y"))
    assert float(scoring.headline(scoring.closed[[0, 1], [0, 1]])) == pytest.approx(1.0, abs=1e-12)
    assert float(scoring.headline(scoring.closed[[0, 1], [1, 0]])) == pytest.approx(0.0, abs=1e-12)
    assert Scoring.of([made_context({"x": (0.5, 0.5)}, left=(0.2, 0.2))], ("x",)).unit == UTILITY


def test_one_arm_per_merge_serves_both_tasks() -> None:
    contexts = [made_context({arm: (0.5, 0.5) for arm in ARMS}, task=task) for task in ("s", "t")]
    scores = np.array([[0.9, 0.0, 0.5], [0.0, 0.2, 0.6]])
    assert shares_of(scores, units_of(contexts, per_merge=True)).argmax(1).tolist() == [2, 2]
    assert shares_of(scores, units_of(contexts, per_merge=False)).argmax(1).tolist() == [0, 2]
