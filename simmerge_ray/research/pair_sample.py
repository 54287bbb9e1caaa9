"""Means over pairs with intervals that draw checkpoints, and rank correlations: pairs that share one are not
independent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from simmerge_ray.research.study.gains import percentile_interval
from simmerge_ray.selector.data.splits import resampled_weights

NUM_RESAMPLES = 2000
_NUM_RANKINGS = 300  # of a pooled rank correlation, which sorts everything each time

Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class PairSample:
    """Values by pair, or by larger sets of one size, in the order of `pairs`. base_of: by checkpoint; bases are drawn
    before their checkpoints."""

    pairs: tuple[tuple[str, ...], ...]
    base_of: Mapping[str, str] | None = None

    @cached_property
    def weights(self) -> np.ndarray:
        """(S, N), how often each pair is in a sample of bases and checkpoints; samples without a pair are left out."""
        drawn = resampled_weights(self.pairs, self.base_of, NUM_RESAMPLES, seed=0)
        return drawn[drawn.sum(1) > 0]

    def mean(self, values: Values) -> dict[str, Any]:
        """Mean, its 95 % interval, and over how many pairs: those whose value is not NaN. Without any, the former two
        are None."""
        given = np.asarray(values, dtype=np.float64)
        return self._ratio(given, np.where(np.isnan(given), np.nan, 1.0))

    def ratio(self, above: Values, below: Values) -> dict[str, Any]:
        """Of sums over the pairs where neither is NaN."""
        return self._ratio(np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64))

    def _ratio(self, above: np.ndarray, below: np.ndarray) -> dict[str, Any]:
        known = ~np.isnan(above + below)
        weights, top, bottom = self.weights[:, known], above[known], below[known]
        drawn = weights.sum(1) > 0
        if not drawn.any():
            return {"mean": None, "interval": None, "pairs": 0}
        sampled = (weights[drawn] @ top) / (weights[drawn] @ bottom)
        mean = float(top.sum() / bottom.sum())
        return {"mean": mean, "interval": percentile_interval(sampled), "pairs": int(known.sum())}

    def pooled_spearman(self, left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> dict[str, Any]:
        """Rank correlation over all values of all pairs; left, right: an array of each pair."""

        def of(counts: np.ndarray) -> float:
            rows = np.flatnonzero(counts)
            both = (np.concatenate([np.repeat(side[row], int(counts[row])) for row in rows]) for side in (left, right))
            return rank_correlation(*both)

        sampled = np.array([of(counts) for counts in self.weights[:_NUM_RANKINGS]])
        whole = of(np.ones(len(self.pairs)))
        return {"mean": whole, "interval": percentile_interval(sampled), "pairs": len(self.pairs)}


def rank_correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Spearman's, 0 where one side is constant: nothing is said of the order then."""
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(spearmanr(left, right).statistic)
