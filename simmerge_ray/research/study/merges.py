"""Which merges the study labels: pairs with every arm, and a sample of plans over more checkpoints. Seeded."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations

from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.plans.operators.specs import Arm, make_arm
from simmerge_ray.plans.plan import WEIGHTINGS, MergePlan, fold_plan, pair_plans

REFERENCE_ARMS: tuple[Arm, ...] = (
    make_arm("linear"),
    make_arm("nuslerp"),
    make_arm("ties", {"density": 0.1}),
    make_arm("ties", {"density": 0.5}),
)
LATER_ARM = make_arm("task_arithmetic")  # the new operator that is learned from few labels
CONTROL_ARM = make_arm("scale_matched_linear")  # a trivial baseline, no arm of the selector

Utilities = Mapping[str, Mapping[str, float]]  # task -> checkpoint -> utility, unmerged


def labelled_pairs(catalogue: Catalogue) -> list[MergePlan]:
    """Cross-domain pairs, each with the reference arms, the later one and the control."""
    return pair_plans(catalogue.pairs("cross-task"), (*REFERENCE_ARMS, LATER_ARM, CONTROL_ARM))


def draw_subsets(catalogue: Catalogue, size: int, num: int, seed: int) -> list[tuple[str, ...]]:
    """At most `num` subsets, drawn at random among those with as many domains as their size allows."""
    num_domains = min(size, len({catalogue.own_task[name] for name in catalogue.ids}))
    every = combinations(sorted(catalogue.ids), size)
    subsets = [subset for subset in every if len({catalogue.own_task[name] for name in subset}) == num_domains]
    return sorted(random.Random(f"subsets/{seed}/{size}").sample(subsets, min(num, len(subsets))))


def ordered_by_utility(members: Sequence[str], catalogue: Catalogue, utilities: Utilities) -> list[str]:
    """Members from the least to the best mean utility on all members' own tasks: the order of *expert last*."""
    tasks = sorted({task for name in members if (task := catalogue.own_task[name])})
    means = {name: sum(utilities[task][name] for task in tasks) / len(tasks) for name in members}
    return sorted(members, key=lambda name: (means[name], name))


def plans_of(
    members: Sequence[str], catalogue: Catalogue, utilities: Utilities, num_orders: int, num_mixed: int, seed: int
) -> list[MergePlan]:
    """The plans of a subset that are labelled, for both weightings; each merge once.

    Every reference arm alone with the expert last and in `num_orders` random orders, and `num_mixed` plans with an arm
    drawn for each step. The equal-weight linear merge is the same in every order and taken once.
    """
    generator = random.Random("/".join([str(seed), *sorted(members)]))
    expert_last = ordered_by_utility(members, catalogue, utilities)
    found: list[MergePlan] = []
    for weighting in WEIGHTINGS:
        orders = [expert_last, *(generator.sample(sorted(members), len(members)) for _ in range(num_orders))]
        found += [
            fold_plan(order, [arm], weighting)
            for arm in REFERENCE_ARMS
            for order in (orders[:1] if arm.operator == "linear" and weighting == "equal" else orders)
        ]
        for _ in range(num_mixed):
            order = generator.sample(sorted(members), len(members))
            found.append(fold_plan(order, generator.choices(REFERENCE_ARMS, k=len(members) - 1), weighting))
    return list({plan.id: plan for plan in found}.values())


def every_subset(members: Sequence[str], num_plans: int, seed: int) -> list[MergePlan]:
    """For every subset of two or more, plans with equal weights: the linear merge, then random orders and arms."""
    generator = random.Random(f"every subset/{seed}")
    found: list[MergePlan] = []
    for size in range(2, len(members) + 1):
        for subset in combinations(sorted(members), size):
            found.append(fold_plan(subset, [REFERENCE_ARMS[0]]))
            found += [fold_plan(generator.sample(subset, size), [arm]) for arm in REFERENCE_ARMS[1:num_plans]]
    return list({plan.id: plan for plan in found}.values())
