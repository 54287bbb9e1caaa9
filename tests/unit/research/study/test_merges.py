from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.plans.plan import fold_plan
from simmerge_ray.research.study.merges import (
    REFERENCE_ARMS,
    draw_subsets,
    every_subset,
    labelled_pairs,
    ordered_by_utility,
    plans_of,
)

TASKS = ("code", "math", "rag", "multilingual")


@pytest.fixture
def catalogue() -> Catalogue:
    refs = tuple(CheckpointRef(f"{task}-{n}", Path(f"{task}-{n}"), "base") for task in TASKS for n in (1, 2, 3))
    return Catalogue(refs, {ref.id: ref.id[:-2] for ref in refs}, CheckpointRef("base", Path("base")))


def utilities(catalogue: Catalogue) -> dict[str, dict[str, float]]:
    return {task: {name: len(task) * (n + 1) / 100 for n, name in enumerate(catalogue.ids)} for task in TASKS}


def test_pairs_are_cross_domain_with_every_arm(catalogue):
    plans = labelled_pairs(catalogue)
    assert len(plans) == 54 * 6 == len({plan.id for plan in plans})
    assert all(catalogue.own_task[plan.members[0]] != catalogue.own_task[plan.members[1]] for plan in plans)


@pytest.mark.parametrize(("size", "num_domains"), [(3, 3), (4, 4), (5, 4), (6, 4)])
def test_subsets_have_as_many_domains_as_their_size_allows(catalogue, size, num_domains):
    subsets = draw_subsets(catalogue, size, 5, seed=1)
    assert len(set(subsets)) == 5
    assert all(len({catalogue.own_task[name] for name in subset}) == num_domains for subset in subsets)
    assert subsets == draw_subsets(catalogue, size, 5, seed=1) != draw_subsets(catalogue, size, 5, seed=2)


def test_more_subsets_than_there_are_takes_all(catalogue):
    assert len(draw_subsets(catalogue, 4, 1000, seed=1)) == 3**4


def test_the_expert_comes_last(catalogue):
    members = ("rag-2", "code-1", "math-3")
    assert ordered_by_utility(members, catalogue, utilities(catalogue)) == ["code-1", "math-3", "rag-2"]


def test_plans_of_a_subset(catalogue):
    members = ("code-1", "math-3", "rag-2")
    plans = plans_of(members, catalogue, utilities(catalogue), num_orders=1, num_mixed=4, seed=1)
    assert len({plan.id for plan in plans}) == len(plans)
    assert all(sorted(plan.members) == sorted(members) for plan in plans)
    ids = {plan.id for plan in plans}
    last = ordered_by_utility(members, catalogue, utilities(catalogue))
    for weighting in ("equal", "halving"):
        assert {fold_plan(last, [arm], weighting).id for arm in REFERENCE_ARMS} <= ids
    linear = fold_plan(last, [REFERENCE_ARMS[0]])
    assert sum(one.steps[0].arm == one.steps[1].arm == REFERENCE_ARMS[0] and one.steps[1].weight < 0.5 for one in plans)
    assert linear.id in ids


def test_every_subset_of_a_small_catalogue():
    members = ["a", "b", "c", "d"]
    plans = every_subset(members, 4, seed=3)
    subsets = Counter(tuple(sorted(plan.members)) for plan in plans)
    assert set(subsets) == {s for size in (2, 3, 4) for s in combinations(members, size)}
    assert set(subsets.values()) == {4}
