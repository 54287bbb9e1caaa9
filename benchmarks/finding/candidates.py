"""Candidates of a pair: a fixed grid of 48, and the space in which samplers look for more."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, make_arm
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import plain_average, recipe_of

BASE_ID = "base"
STEPS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
AVERAGE = "average"
ARMS = ("task_arithmetic", "ties", "scale_matched_linear")
MOST_WEIGHT = 1.5
Suggest = Callable[[str, float, float], float]  # a number from low to high


def weighted(left: str, right: str, x: float, y: float, arm: str = "task_arithmetic", **parameters: float) -> MergePlan:
    """A recipe of two weights; what is one of the checkpoints as it is, is that checkpoint."""
    if x == y == 0.0:
        return MergePlan(source=BASE_ID)
    if arm == "task_arithmetic" and (x, y) in ((1.0, 0.0), (0.0, 1.0)):
        return MergePlan(source=left if x else right)
    return MergePlan(recipe=recipe_of(make_arm(arm, parameters), {left: x, right: y}))


def fixed_grid(left: str, right: str) -> dict[str, MergePlan]:
    """Of a pair, by name: 36 weights in [0, 1] with both parents and the base among them, norm-matched, TIES of three
    densities and scales, the plain average, and a sum of task vectors at .7."""
    plans = {f"{x:g}/{y:g}": weighted(left, right, x, y) for x, y in product(STEPS, STEPS)}
    plans["norm"] = weighted(left, right, 1.0, 1.0, "scale_matched_linear")
    for density, scale in product((0.1, 0.3, 0.5), (0.7, 1.0, 1.4)):
        plans[f"ties {density:g} x {scale:g}"] = weighted(left, right, 1.0, 1.0, "ties", density=density, scale=scale)
    plans[AVERAGE] = MergePlan(recipe=plain_average((left, right)))
    plans["sum .7"] = weighted(left, right, 0.7, 0.7)
    return plans


def suggested(left: str, right: str, arm: str, suggest: Suggest) -> MergePlan:
    """The recipe of an operator that suggested numbers make: both weights in [0, 1.5], density, scale."""
    x, y = (round(suggest(f"weight{number}", 0.0, MOST_WEIGHT), 4) for number in (1, 2))
    parameters = {}
    if arm == "ties":
        searched = {name: spec.searched for name, spec in OPERATOR_SPECS[arm].parameters.items()}
        for name in ("density", "scale"):
            low, high = searched[name] or (0.0, 1.0)
            parameters[name] = round(suggest(f"{arm}:{name}", low, high), 4)
    return weighted(left, right, x, y, arm, **parameters)
