"""The recipes that are looked at: how many, of whom, with which weights, and that each of them can be made."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.base.finding import FindConfig
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.plans.operators.specs import parse_arms
from simmerge_ray.plans.plan import MergePlan, resolve_plan
from simmerge_ray.search.objectives import parse_objective
from simmerge_ray.selector.finding.aim import Aim
from simmerge_ray.selector.finding.space import (
    MAX_WEIGHT,
    by_operators,
    kept_checkpoints,
    spread_sums,
    subsets_of,
    sum_of,
    sums_around,
)
from simmerge_ray.selector.finding.virtual import virtual_ranking
from simmerge_ray.signals.candidates.signatures import Owner
from tests.unit.selector.finding.made_up import own_answers, scorer_of

MEMBERS = tuple(f"m{n:02}" for n in range(12))


def sizes(rows):
    return np.unique((rows > 0).sum(1)).tolist()


@pytest.mark.parametrize("num_members", [2, 3, 4, 12])
@pytest.mark.parametrize("ways", [(1, 4), (2, 2), (1, 1)])
def test_spread_sums_reach_every_subset_size_with_weights_in_range(num_members, ways):
    members = MEMBERS[:num_members]
    rows = spread_sums(members, ways, 5000, 0)
    assert rows.shape[1] == num_members
    assert 0.7 * 5000 <= len(rows) <= 1.5 * 5000
    assert (rows >= 0).all() and (rows <= MAX_WEIGHT).all() and np.isfinite(rows).all()
    assert sizes(rows) == list(range(ways[0], min(ways[1], num_members) + 1))
    if num_members <= 4:
        for size in range(ways[0], min(ways[1], num_members) + 1):
            seen = {tuple(np.flatnonzero(row)) for row in rows if (row > 0).sum() == size}
            assert seen == set(combinations(range(num_members), size))


def test_seeds_reproduce():
    args = (MEMBERS, (1, 4), 1000)
    assert spread_sums(*args, 3).tolist() == spread_sums(*args, 3).tolist() != spread_sums(*args, 4).tolist()
    rows = spread_sums(MEMBERS[:3], (1, 3), 100, 0)[-8:]
    near = sums_around(rows, (1, 3), 50, 5)
    assert near.tolist() == sums_around(rows, (1, 3), 50, 5).tolist() != sums_around(rows, (1, 3), 50, 6).tolist()


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 3), st.integers(1, 120), st.integers(0, 99))
def test_subsets_are_whole_small_ones_then_a_part(num_members, low, more, count, seed):
    ways = (low, low + more)
    found = subsets_of(MEMBERS[:num_members], ways, count, seed)
    assert len(set(found)) == len(found) <= count
    assert all(low <= len(one) <= ways[1] and list(one) == sorted(set(one)) for one in found)
    every = [one for n in range(low, min(ways[1], num_members) + 1) for one in combinations(MEMBERS[:num_members], n)]
    if len(every) <= count:
        assert found == every


@given(
    st.integers(0, 2**16),
    st.integers(2, 5),
    st.sampled_from([(1, 1), (1, 3), (2, 2), (2, 5)]),
)
def test_neighbours_stay_in_range_and_keep_to_the_numbers_of_members(seed, num_members, ways):
    members = MEMBERS[:num_members]
    rows = spread_sums(members, ways, 100, seed)
    rows = rows[np.random.default_rng(seed).permutation(len(rows))[:7]]
    rows = np.where(rows > 0, np.minimum(rows, 0.05), 0.0)  # so near to 0 that a move may well take it there
    near = sums_around(rows, ways, 200, seed)
    assert near.shape == (200, num_members)
    assert (near >= 0).all() and (near <= MAX_WEIGHT).all()
    assert all(ways[0] <= size <= ways[1] for size in sizes(near.round(3)))


def test_a_sum_is_rounded_and_a_checkpoint_with_weight_1_is_kept():
    assert sum_of([("a", 0.0), ("b", 0.0004)]) is None
    assert sum_of([("a", 1.0002), ("b", 0.0)]) == MergePlan(source="a")
    one = sum_of([("a", 0.70049), ("b", 1.0)])
    assert one is not None and one.recipe is not None
    assert (one.recipe.members, one.recipe.weights) == (("a", "b"), (0.7, 1.0))
    scaled = sum_of([("a", 0.5)])
    assert scaled is not None and scaled.is_merge and scaled.members == ("a",)


def test_the_base_stands_first_among_checkpoints_as_they_are():
    assert [plan.source for plan in kept_checkpoints(["a", "b"], "base")] == ["base", "a", "b"]
    assert [plan.source for plan in kept_checkpoints(["a", "base"], "base")] == ["base", "a"]


ARMS = parse_arms(("linear", "ties(density=0.1)", "scale_matched_linear", "slerp", "dare_linear(scale=0.5)", "sce"))


def test_operators_are_tried_on_subsets_that_they_can_take():
    found = by_operators([("m0",), ("m0", "m1"), ("m0", "m1", "m2")], ARMS)
    assert len({plan.id for plan in found}) == len(found)
    by_operator = {}
    for plan in found:
        assert plan.recipe is not None
        by_operator.setdefault(plan.recipe.arm.operator, set()).add(len(plan.members))
    assert by_operator == {
        "ties": {2, 3}, "scale_matched_linear": {2, 3}, "slerp": {2}, "dare_linear": {2, 3}, "sce": {2, 3},
    }  # fmt: skip
    assert {plan.recipe.arm.label for plan in found if plan.recipe.arm.operator == "dare_linear"} == {
        "dare_linear(scale=0.5)"  # a scale that is given is kept
    }


def test_every_recipe_compiles(catalogue):
    members = catalogue.ids
    rows = spread_sums(members, (1, 3), 300, 0)[::10]
    plans = [sum_of(zip(members, row, strict=True)) for row in rows] + by_operators([members[:2], members], ARMS)
    assert len(plans) > 100
    for plan in plans[:: 1 + len(plans) // 150]:
        assert plan is not None
        if plan.is_merge:
            graph = compile_plan(resolve_plan(plan, catalogue), check=False)
            assert len(graph.outputs) == 20


@pytest.mark.parametrize("num_members", [2, 3, 4, 12])
def test_at_least_so_many_recipes_are_scored(num_members):
    members = MEMBERS[:num_members]
    owners = tuple(Owner(name, "math") for name in members[:3])
    answers = [own_answers(members, owner, num_probes=4, seed=n) for n, owner in enumerate(owners)]
    aim = Aim(owners, "base", parse_objective("mean", ["math"]))
    config = FindConfig(num_recipes=3000)
    found = virtual_ranking(scorer_of(members, answers, aim), members, config)
    assert 3000 <= len(found.scores) == len(found.coefficients) <= 4500
    assert sizes(found.coefficients) == list(range(1, min(4, num_members) + 1))
    assert np.isfinite(found.scores).all() and found.scores.max() <= 1.0
    assert found.plans and all(plan.recipe.arm.operator != "linear" for plan in found.plans.values())
    again = virtual_ranking(scorer_of(members, answers, aim), members, config)
    assert again.coefficients.tolist() == found.coefficients.tolist() and again.scores.tolist() == found.scores.tolist()
    two = virtual_ranking(scorer_of(members, answers, aim), members, config.model_copy(update={"ways": (2, 2)}))
    assert sizes(two.coefficients.round(3)) == [2]


def test_scores_of_a_candidate_do_not_depend_on_its_neighbours():
    members = MEMBERS[:2]
    owners = tuple(Owner(name, name) for name in members)
    answers = [own_answers(members, owner, num_probes=6, seed=n) for n, owner in enumerate(owners)]
    aim = Aim(owners, "base", parse_objective("mean", members))
    scorer = scorer_of(members, answers, aim)
    rows = spread_sums(members, (1, 2), 100, 0)
    whole = scorer.of_sums(rows)
    parts = scorer.of_sums(rows[:40]).joined(scorer.of_sums(rows[40:]))
    for name in ("coefficients", "retention", "nll", "kl", "scores"):
        assert getattr(whole, name).tolist() == getattr(parts, name).tolist()
