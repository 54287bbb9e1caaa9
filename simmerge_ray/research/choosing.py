"""What ways of choosing a merge are worth: utilities over pairs, with intervals over checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from simmerge_ray.research.pair_sample import PairSample

_HALVES = (slice(0, None, 2), slice(1, None, 2))

PairItems = Mapping[str, Mapping[str, np.ndarray]]
"""Of one pair: utilities of the items, by what was measured and by task; all on the same tasks and items."""


def utility(items: Mapping[str, np.ndarray]) -> float:
    """Mean over tasks of the mean over items."""
    return float(np.mean([values.mean() for values in items.values()]))


def halves_of(items: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Utility on the even and on the odd items."""
    even, odd = (utility({task: values[half] for task, values in items.items()}) for half in _HALVES)
    return even, odd


def split_half_oracle(options: PairItems) -> float:
    """Utility of the option that is best on one half of the items, on the other half; mean of both directions. Options
    that are equally good on the choosing half are averaged."""
    halves = np.array([halves_of(items) for items in options.values()])
    scored = []
    for choosing, scoring in ((0, 1), (1, 0)):
        best = halves[:, choosing] >= halves[:, choosing].max() - 1e-12
        scored.append(halves[best, scoring].mean())
    return float(np.mean(scored))


def best_elsewhere(utilities: np.ndarray, groups: Sequence[Collection[str]] | None = None) -> np.ndarray:
    """(P,) column that is best on the mean of all other pairs; with a group of names for each pair (its checkpoints,
    its base), of those whose groups have none in common with its own; -1 where there are none. utilities: (P, K); NaN
    is left out."""
    known = ~np.isnan(utilities)
    places = range(len(utilities))
    others = np.array([
        [one != other and not (groups and {*groups[one]} & {*groups[other]}) for other in places] for one in places
    ], dtype=float)  # fmt: skip
    counts = others @ known
    sums = others @ np.where(known, utilities, 0.0)
    means = np.divide(sums, counts, out=np.full(utilities.shape, -np.inf), where=counts > 0)
    return np.where(counts.any(1), means.argmax(1), -1)


def taken(utilities: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(P,) utility of the column that is taken of each pair; NaN where none is, -1."""
    return np.where(columns >= 0, utilities[np.arange(len(utilities)), columns], np.nan)


def compare_ways(sample: PairSample, ways: Mapping[str, np.ndarray], against: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each way: mean utility, and how much more that is than by the ways of `against`, paired.

    Args:
        ways: (P,) utilities by name, of the sample's pairs; NaN where a way says nothing.

    Returns:
        way, num_pairs, utility, interval, and `over`: gain, interval and number of pairs by name. Intervals are of 95 %
        when the sample's checkpoints are drawn with replacement; None where no draw holds a pair.
    """

    def mean(values: np.ndarray) -> dict[str, Any]:
        found = sample.mean(values)
        return {"num_pairs": found["pairs"], "value": found["mean"], "interval": found["interval"]}

    rows = []
    for name, values in ways.items():
        of_way = mean(values)
        over = {other: mean(values - ways[other]) for other in against if other != name}
        rows.append({"way": name, "utility": of_way.pop("value"), **of_way, "over": over})
    return rows
