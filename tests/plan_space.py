"""The space of plans, one by one: what faster searches are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations, product

from simmerge_ray.plans.operators.specs import Arm
from simmerge_ray.plans.plan import MergePlan, fold_plan


def enumerate_plans(
    members: Sequence[str], arms: Sequence[Arm], ways: Sequence[int], weighting: str = "equal"
) -> Iterator[MergePlan]:
    """Every ordered subset of the given sizes with every sequence of arms, each merge once.

    The first two of a fold commute where the operator is symmetric and their weights are equal.
    """
    seen: set[str] = set()
    for size in ways:
        for subset in permutations(members, size):
            for chosen in product(arms, repeat=size - 1):
                plan = fold_plan(subset, chosen, weighting)
                if plan.id not in seen:
                    seen.add(plan.id)
                    yield plan
