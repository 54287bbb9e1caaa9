"""Which merges of a pair are labelled, and which pairs first, so that every part of the labels is of use."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import combinations, product

from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, pair_plan
from simmerge_ray.plans.recipe import Recipe, plain_average
from simmerge_ray.research.labelling import teacher_forced
from simmerge_ray.search.evaluation import EvaluationTask
from simmerge_ray.search.evaluation.tasks import Task
from simmerge_ray.selector.data.splits import Group, Pair

NUM_REAL_ITEMS = 100  # of each task, drawn once; the machine's hours do not suffice for all 400
NUM_SIGNAL_PROBES = 32  # of each task, for the signals of candidates that are labelled
AVERAGE = "average"
_LEVELS = (0.4, 0.7, 1.0)  # of a member's weight in a sum of task vectors
_SET_DENSITIES = (0.1, 0.5)  # of TIES, where there are several members


def pair_order(catalogue: Catalogue, seed: int | str = 0) -> list[Pair]:
    """Pairs of two tasks in a random order, so that those that are labelled first are a sample of all."""
    pairs = catalogue.pairs()
    random.Random(f"order of pairs/{seed}").shuffle(pairs)
    return pairs


def set_order(catalogue: Catalogue, size: int) -> list[Group]:
    """Sets of experts of as many tasks in a random order; of two, that of `pair_order`."""
    if size == 2:
        return list(pair_order(catalogue))
    groups = [group for group in combinations(catalogue.ids, size) if len(catalogue.tasks_of(group)) == size]
    random.Random(f"order of sets of {size}").shuffle(groups)
    return groups


def fixed_candidates(pair: Group) -> dict[str, MergePlan]:
    """By name: the plain average, sums over a grid of weights (task arithmetic 1.0 is one), norm-matched average,
    TIES of three densities and one scaled up, slerp. Both parents and the base are measured, too."""
    left, right = pair
    plans = {f"{x:g}/{y:g}": _sum_of(pair, (x, y)) for x, y in product(_LEVELS, repeat=2)}
    plans["norm-matched"] = _norm_matched(pair)
    for density, scale in ((0.1, 1.0), (0.3, 1.0), (0.5, 1.0), (0.3, 1.4)):
        plans[f"ties {density:g} x {scale:g}"] = _ties(pair, density, scale)
    return {AVERAGE: _plain(pair), "slerp": pair_plan(left, right, make_arm("slerp"))} | plans


def set_candidates(members: Group) -> dict[str, MergePlan]:
    """By name, for any number of members: the plain average, sums of task vectors with one weight for all, norm-matched
    average, TIES of two densities."""
    sums = {f"all x {level:g}": _sum_of(members, (level,) * len(members)) for level in _LEVELS}
    ties = {f"ties {density:g} x 1": _ties(members, density, 1.0) for density in _SET_DENSITIES}
    return {AVERAGE: _plain(members)} | sums | {"norm-matched": _norm_matched(members)} | ties


def _plain(members: Group) -> MergePlan:
    return MergePlan(recipe=plain_average(members))


def _sum_of(members: Group, weights: tuple[float, ...]) -> MergePlan:
    return MergePlan(recipe=Recipe(make_arm("task_arithmetic"), members, weights))


def _norm_matched(members: Group) -> MergePlan:
    return MergePlan(recipe=Recipe(make_arm("scale_matched_linear"), members, (1.0,) * len(members)))


def _ties(members: Group, density: float, scale: float) -> MergePlan:
    arm = make_arm("ties", {"density": density, "scale": scale})
    return MergePlan(recipe=Recipe(arm, members, (1.0,) * len(members)))


def label_tasks(
    tasks: Mapping[str, Task], tokenizer: object, num_items: int | None = None
) -> dict[str, EvaluationTask]:
    """Each task's items, or a sample of them; exact match is read off one forward pass."""
    sampled = {name: task.sampled(num_items) for name, task in tasks.items()}
    return {name: teacher_forced(task, tokenizer) if task.generates else task for name, task in sampled.items()}
