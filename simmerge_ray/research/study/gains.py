"""GapClosed where one arm serves a whole merge, and the gain over the best fixed arm, with resampled intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from simmerge_ray.selector.assessment.baselines import best_fixed
from simmerge_ray.selector.assessment.folds import CrossValidation
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.scoring import Scoring, keeping_no_parent, shares_of, units_of
from simmerge_ray.selector.data.splits import pairs_of, resampled_weights

NUM_RESAMPLES = 2000


def percentile_interval(values: np.ndarray) -> list[float]:
    """95 % interval from resampled values, NaN left out."""
    low, high = np.nanquantile(values, [0.025, 0.975])
    return [float(low), float(high)]


@dataclass(frozen=True)
class MergeScoring:
    """Takes scores of options (N, K + 2) to GapClosed. units: rows of each merge. samples: (S, D), how often each of
    the D contexts with GapClosed is in a sample of bases and of their checkpoints."""

    scoring: Scoring
    units: list[list[int]]
    samples: np.ndarray

    @staticmethod
    def of(dataset: SelectionDataset, base_of: Mapping[str, str] | None, seed: int) -> MergeScoring:
        scoring, pairs = Scoring.of(dataset.contexts, dataset.arms), pairs_of(dataset.contexts)
        samples = resampled_weights([pairs[row] for row in scoring.rows], base_of, NUM_RESAMPLES, seed)
        return MergeScoring(scoring, units_of(dataset.contexts, per_merge=True), samples)

    def taken(self, scores: np.ndarray) -> np.ndarray:
        """(D,) numerators of GapClosed of what has the highest score for each merge."""
        return self.scoring.taken(shares_of(scores, self.units))

    def gap_closed(self, taken: np.ndarray) -> float:
        """The headline of (D,) numerators, or of their difference."""
        return float(self.scoring.headline(taken))

    def interval(self, taken: np.ndarray) -> list[float]:
        """95 % interval of `gap_closed`."""
        return percentile_interval(self.scoring.headline(taken, self.samples))


def gain_over_best_fixed(crossval: CrossValidation, merges: MergeScoring) -> np.ndarray:
    """(D,) numerators: the selector less the best fixed arm, both without the tested merges."""
    predicted = keeping_no_parent(crossval.unseen(crossval.dataset, crossval.config))
    return merges.taken(predicted) - merges.taken(crossval.baseline(best_fixed))
