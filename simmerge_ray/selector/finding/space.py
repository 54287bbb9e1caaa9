"""The recipes that a choice without labels looks at.

Sums of task vectors `base + sum_i w_i tau_i`, every w_i in [0, 1.5] (averages and scaled averages are among them), over
all subsets; then the other operators on the subsets that look best; and every checkpoint as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations, product

import numpy as np

from simmerge_ray.plans.operators.specs import Arm, make_arm
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import Recipe, recipe_of

MAX_WEIGHT = 1.5
_DECIMALS = 3
_SINGLE = 30  # scaled versions of one checkpoint
_NEAR = 0.12  # standard deviation of a weight's change
_LEAST = 8  # recipes of a subset; of more subsets than these allow a part is looked at
_RATIOS = (0.5, 1.0, 2.0)  # weights of operators that divide by their sum, up to a factor
_SCALES = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6)

Subset = tuple[str, ...]


def kept_checkpoints(members: Sequence[str], base: str) -> list[MergePlan]:
    """Every checkpoint as it is, the base first."""
    return [MergePlan(source=name) for name in dict.fromkeys([base, *members])]


def sum_of(weights: Iterable[tuple[str, float]]) -> MergePlan | None:
    """The sum of task vectors with these weights, rounded; None where all of them are 0, a checkpoint as it is where
    it is one with weight 1."""
    kept = {name: rounded for name, weight in weights if (rounded := round(float(weight), _DECIMALS)) > 0}
    if not kept:
        return None
    if list(kept.values()) == [1.0]:
        return MergePlan(source=next(iter(kept)))
    return MergePlan(recipe=recipe_of(make_arm("task_arithmetic"), kept))


def subsets_of(members: Sequence[str], ways: tuple[int, int], count: int, seed: int) -> list[Subset]:
    """All subsets of these sizes, or, where they are more than `count`, all small ones and a random part of the size
    that is too many."""
    found: list[Subset] = []
    for size in range(ways[0], min(ways[1], len(members)) + 1):
        room = count - len(found)
        if math.comb(len(members), size) <= room:
            found += combinations(members, size)
            continue
        generator = np.random.default_rng(seed)
        drawn = {tuple(sorted(generator.choice(len(members), size, replace=False).tolist())) for _ in range(room)}
        return found + [tuple(members[place] for place in places) for places in sorted(drawn)]
    return found


def spread_sums(members: Sequence[str], ways: tuple[int, int], count: int, seed: int) -> np.ndarray:
    """(about `count`, members) weights of sums of task vectors, as evenly over weights and subsets as it goes."""
    subsets = subsets_of(members, ways, max(1, count // _LEAST), seed)
    large = sum(len(subset) > 1 for subset in subsets)
    single = _SINGLE if large else max(_SINGLE, count // len(subsets))
    each = max(_LEAST, (count - single * (len(subsets) - large)) // max(1, large))
    found = []
    for number, subset in enumerate(subsets):
        if len(subset) == 1:
            weights = np.linspace(0, MAX_WEIGHT, single + 1)[1:, None]
        elif len(subset) == 2:
            levels = np.linspace(0, MAX_WEIGHT, max(2, math.ceil(each**0.5)) + 1)[1:]
            weights = np.array(list(product(levels, levels)))
        else:
            weights = MAX_WEIGHT * _spread(len(subset), each, seed + number)
        rows = np.zeros((len(weights), len(members)))
        rows[:, [members.index(name) for name in subset]] = weights
        found.append(rows)
    return np.concatenate(found)


def sums_around(rows: np.ndarray, ways: tuple[int, int], count: int, seed: int) -> np.ndarray:
    """(count, members) weights near some; half of them with one more member, all with as many as `ways` says.

    Args:
        rows: (n, members).
    """
    generator = np.random.default_rng(seed)
    centres = rows[np.arange(count) % len(rows)]
    present = centres > 0
    grows = (generator.random(count) < 0.5) & (present.sum(1) < ways[1])
    present[np.flatnonzero(grows), generator.integers(0, rows.shape[1], count)[grows]] = True
    moved = (centres + generator.normal(0.0, _NEAR, centres.shape)).clip(0, MAX_WEIGHT)
    moved = np.where(present, moved, 0.0)
    few = (moved.round(_DECIMALS) > 0).sum(1) < ways[0]
    moved[few] = centres[few]
    return moved


def by_operators(subsets: Sequence[Subset], arms: Sequence[Arm]) -> list[MergePlan]:
    """Other operators than sums on some subsets: every arm with a few ratios of weights, and scales where it has one.

    `linear` is left out: its recipes are among the sums.
    """
    found = []
    for subset, arm in product(subsets, arms):
        spec = arm.spec
        most = spec.max_sources or len(subset)
        if arm.operator in ("linear", "task_arithmetic") or not max(2, spec.min_sources) <= len(subset) <= most:
            continue
        ratios = product(_RATIOS, repeat=len(subset) - 1) if spec.uses_weights and len(subset) <= 3 else [()]
        scales = _SCALES if "scale" in spec.parameters and "scale" not in dict(arm.params) else (None,)
        for ratio, scale in product(ratios, scales):
            weights = (1.0, *ratio) if ratio else (1.0,) * len(subset)
            full = arm if scale is None else make_arm(arm.operator, dict(arm.params) | {"scale": scale})
            found.append(MergePlan(recipe=Recipe(full, subset, weights)))
    return list({plan.id: plan for plan in found}.values())


def _spread(dimensions: int, count: int, seed: int) -> np.ndarray:
    """(count, dimensions) points of a scrambled Sobol sequence in [0, 1)."""
    from scipy.stats import qmc

    rounds = max(1, int(np.ceil(np.log2(count))))
    return np.asarray(qmc.Sobol(dimensions, seed=seed).random_base2(rounds)[:count])
