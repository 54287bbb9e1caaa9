"""Which merges of a pair are labelled, and which pairs first, so that every part of the labels is of use."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import product

from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, pair_plan
from simmerge_ray.plans.recipe import Recipe, plain_average
from simmerge_ray.research.labelling import teacher_forced
from simmerge_ray.search.evaluation import EvaluationTask
from simmerge_ray.search.evaluation.tasks import Task
from simmerge_ray.selector.data.splits import Pair

NUM_REAL_ITEMS = 100  # of each task, drawn once; the machine's hours do not suffice for all 400
NUM_SIGNAL_PROBES = 32  # of each task, for the signals of candidates that are labelled
AVERAGE = "average"
_LEVELS = (0.4, 0.7, 1.0)  # of a member's weight in a sum of task vectors


def pair_order(catalogue: Catalogue, seed: int | str = 0) -> list[Pair]:
    """Pairs of two tasks in a random order, so that those that are labelled first are a sample of all."""
    pairs = catalogue.pairs()
    random.Random(f"order of pairs/{seed}").shuffle(pairs)
    return pairs


def fixed_candidates(left: str, right: str) -> dict[str, MergePlan]:
    """By name: the plain average, sums over a grid of weights (task arithmetic 1.0 is one), norm-matched average,
    TIES of three densities and one scaled up, slerp. Both parents and the base are measured, too."""
    pair, recipes = (left, right), {}
    for x, y in product(_LEVELS, repeat=2):
        recipes[f"{x:g}/{y:g}"] = Recipe(make_arm("task_arithmetic"), pair, (x, y))
    recipes["norm-matched"] = Recipe(make_arm("scale_matched_linear"), pair, (1.0, 1.0))
    for density, scale in ((0.1, 1.0), (0.3, 1.0), (0.5, 1.0), (0.3, 1.4)):
        arm = make_arm("ties", {"density": density, "scale": scale})
        recipes[f"ties {density:g} x {scale:g}"] = Recipe(arm, pair, (1.0, 1.0))
    plans = {name: MergePlan(recipe=recipe) for name, recipe in recipes.items()}
    first = {AVERAGE: MergePlan(recipe=plain_average(pair)), "slerp": pair_plan(*pair, make_arm("slerp"))}
    return first | plans


def label_tasks(
    tasks: Mapping[str, Task], tokenizer: object, num_items: int | None = None
) -> dict[str, EvaluationTask]:
    """Each task's items, or a sample of them; exact match is read off one forward pass."""
    sampled = {name: task.sampled(num_items) for name, task in tasks.items()}
    return {name: teacher_forced(task, tokenizer) if task.generates else task for name, task in sampled.items()}
