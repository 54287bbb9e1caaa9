"""The shortlist: of the best candidates those that differ."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import recipe_of
from simmerge_ray.search.objectives import parse_objective
from simmerge_ray.selector.finding.aim import Aim, worth
from simmerge_ray.selector.finding.virtual import VirtualScores, shortlist
from simmerge_ray.signals.candidates.signatures import Owner
from simmerge_ray.signals.candidates.virtual import VirtualAnswers
from tests.unit.selector.finding.made_up import own_answers, scorer_of

IDS = ("a", "b")


def scores_of(rows, scores, plans=None) -> VirtualScores:
    rows, nothing = np.array(rows, dtype=np.float64), np.zeros((len(rows), 1))
    return VirtualScores(IDS, rows, plans or {}, nothing, nothing, nothing, np.array(scores, dtype=np.float64))


def weights_of(plan):
    return np.array([dict(zip(plan.recipe.members, plan.recipe.weights, strict=True)).get(name, 0.0) for name in IDS])


def grid(num=31):
    levels = np.linspace(0, 1.5, num)
    return np.array([(x, y) for x in levels for y in levels])


def test_it_is_sorted_diverse_and_holds_the_best_one():
    rows = grid()
    scores = 1 - ((rows - [0.8, 0.6]) ** 2).sum(1)
    found = shortlist(scores_of(rows, scores), 12)
    assert len(found) == 12 and len({plan.id for plan in found}) == 12
    places = np.array([weights_of(plan) for plan in found])
    np.testing.assert_allclose(places[0], [0.8, 0.6])
    of_found = 1 - ((places - [0.8, 0.6]) ** 2).sum(1)
    assert (np.diff(of_found) <= 1e-12).all()
    apart = [np.abs(one - other).max() for one, other in combinations(places, 2)]
    assert min(apart) >= 0.05 - 1e-9  # the third turn's distance; the first half keeps 0.2
    assert sum(np.abs(places[1:] - places[0]).max(1) >= 0.2 - 1e-9) >= 5


def test_without_a_distance_the_neighbours_of_the_best_would_fill_it():
    rows = grid()
    scores = 1 - ((rows - [0.8, 0.6]) ** 2).sum(1)
    best = rows[np.argsort(-scores)[:12]]
    found = np.array([weights_of(plan) for plan in shortlist(scores_of(rows, scores), 12)])
    assert found.std(0).min() > 1.5 * best.std(0).max()


@given(st.integers(0, 2**16), st.integers(1, 30), st.integers(1, 12))
def test_small_spaces_and_any_count(seed, num, count):
    generator = np.random.default_rng(seed)
    rows = generator.uniform(0, 1.5, (num, 2)) * (generator.random((num, 2)) < 0.7)
    scores = generator.random(num)
    found = shortlist(scores_of(rows, scores), count)
    assert len(found) <= count
    assert all(plan.is_merge for plan in found) and len(set(found)) == len(found)
    merges = {plan for n in range(num) if (plan := scores_of(rows, scores).plan(n)) is not None and plan.is_merge}
    assert set(found) <= merges and (found or not merges)


def test_no_kept_checkpoints_no_base_and_nothing_that_is_forbidden():
    rows = [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.6, 0.6], [1.2, 0.2], [0.3, 0.3]]
    found = shortlist(scores_of(rows, [0.9, 0.9, 0.9, 0.5, -np.inf, 0.4]), 5)
    assert [weights_of(plan).tolist() for plan in found] == [[0.6, 0.6], [0.3, 0.3]]
    assert shortlist(scores_of(rows, [-np.inf] * 6), 5) == []


def test_other_operators_stand_beside_sums_with_their_own_plans():
    plan = MergePlan(recipe=recipe_of(make_arm("ties"), {"a": 1.0, "b": 1.0}))
    found = scores_of([[0.2, 0.2]], [0.3]).joined(scores_of([[0.7, 0.7]], [0.8], {0: plan}))
    assert found.plan(1) == plan and found.order.tolist() == [1, 0]
    assert shortlist(found, 2)[0] == plan


def test_scores_are_the_aim_s_of_every_owner_s_mixture():
    owners = (Owner("a", "x"), Owner("b", "y"), Owner("base", "general"))
    answers = [own_answers(IDS, owner, num_probes=9, seed=n) for n, owner in enumerate(owners)]
    aim = Aim(owners[::-1], "base", parse_objective("x=2,y=1", ["x", "y"]), forget=0.4)
    rows = np.random.default_rng(0).uniform(0, 1.5, (20, 2))
    found = scorer_of(IDS, answers, aim).of_sums(rows)
    for place, one in enumerate(answers[::-1]):
        alone = VirtualAnswers(one.kept).scores(rows)
        for name in ("retention", "nll", "kl"):
            assert getattr(found, name)[:, place].tolist() == getattr(alone, name).tolist()
    each = worth(found.retention, found.nll)
    expected = (2 * each[:, 2] + each[:, 1]) / 3
    fine = found.retention[:, 0] >= 0.6 - 1e-9
    np.testing.assert_allclose(found.scores[fine], expected[fine], rtol=1e-12)
    assert np.isneginf(found.scores[~fine]).all() and 0 < fine.sum() < 20
