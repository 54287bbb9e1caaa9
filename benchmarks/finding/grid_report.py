"""Who chooses what among the fixed 48 candidates of a pair, and what it is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.finding.candidates import AVERAGE
from benchmarks.finding.grid import GridPair
from benchmarks.finding.probing import SIGNALS
from simmerge_ray.research.pair_sample import PairSample, rank_correlation

PARENTS = ("1/0", "0/1")
BASE = "0/0"


def split_half_oracle(one: GridPair) -> float:
    """Chosen on one half of the items and reported on the other, both ways."""
    even, odd = one.utility.T
    return float((odd[even.argmax()] + even[odd.argmax()]) / 2)


def by_signal(one: GridPair, name: str) -> int:
    """The candidate with the best signal; of equal retention the one with the lower KL."""
    order = np.lexsort((-one.signal("kl"), -one.signal(name)))
    return int(order[0])


def best_fixed(grid: Sequence[GridPair], place: int, names: Sequence[str]) -> int:
    """The candidate with the highest mean utility over all other pairs, among those named."""
    chosen = [grid[0].names.index(name) for name in names]
    others = np.mean([one.mean for number, one in enumerate(grid) if number != place], axis=0)
    return chosen[int(others[chosen].argmax())]


def usual_candidates(names: Sequence[str]) -> list[str]:
    """What one tries without a search: average, sum of task vectors, norm-matched, TIES."""
    return [name for name in names if name.startswith("ties") or name in (AVERAGE, "norm", "sum .7", "1/1")]


def grid_choices(grid: Sequence[GridPair]) -> dict[str, list[float]]:
    """Utility on all items by who chose and pair."""
    names = list(grid[0].names)
    place = {name: names.index(name) for name in names}

    def of(choose: Callable[[int, GridPair], float]) -> list[float]:
        return [float(choose(number, one)) for number, one in enumerate(grid)]

    found = {
        "plain average": of(lambda _, one: one.mean[place[AVERAGE]]),
        "better parent, in hindsight": of(lambda _, one: max(one.mean[place[name]] for name in PARENTS)),
        "base": of(lambda _, one: one.mean[place[BASE]]),
        "best fixed of the usual kinds, of the other pairs": of(
            lambda n, one: one.mean[best_fixed(grid, n, usual_candidates(names))]
        ),
        "best fixed of all 48, of the other pairs": of(lambda n, one: one.mean[best_fixed(grid, n, names)]),
        "split-half oracle of the 48": of(lambda _, one: split_half_oracle(one)),
        "best of the 48, in hindsight": of(lambda _, one: one.mean.max()),
    }
    for name in SIGNALS:
        found[f"probed {name} of the 48"] = of(lambda _, one, name=name: one.mean[by_signal(one, name)])
    return found


def grid_figures(grid: Sequence[GridPair]) -> dict[str, Any]:
    """Mean utilities with intervals, and how far probed signals go with utility."""
    sample = PairSample(tuple(one.pair for one in grid))
    choices = grid_choices(grid)
    within: Mapping[str, list[float]] = {
        name: [rank_correlation(one.signal(name), one.mean) for one in grid] for name in SIGNALS
    }
    pooled = {
        name: sample.pooled_spearman(
            [SIGNALS[name] * one.by_member[name].ravel() for one in grid], [one.by_task.ravel() for one in grid]
        )
        for name in SIGNALS
    }
    gaps = [one.by_member["retention"].ravel() - one.by_task.ravel() for one in grid]
    return {
        "utility": {name: sample.mean(values) for name, values in choices.items()},
        "pairs": ["+".join(one.pair) for one in grid],
        "by_pair": choices,
        "spearman_over_candidates_and_tasks": pooled,
        "spearman_within_a_pair": {name: sample.mean(values) for name, values in within.items()},
        "retention_as_utility_rmse": float(np.sqrt(np.mean(np.concatenate(gaps) ** 2))),
    }
