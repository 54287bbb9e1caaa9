"""Is a pair like those of the training? Its distance to the nearest of them, against the usual distance among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.selector.models.predictors import squared_distances

NUM_NEIGHBOURS = 5


@dataclass(frozen=True)
class Novelty:
    """Root mean square over the features of the mean Euclidean distance to the 5 nearest training rows.

    rows: (M, F) standardised features of the training pairs, both orders (of one order where there is none).
    limit: distance beyond which a pair is not answered: a quantile of the distances of training pairs to those that
    share no checkpoint with them, as seen by a pair of two new checkpoints of the same kind.
    """

    rows: np.ndarray
    limit: float

    def distances(self, features: np.ndarray) -> np.ndarray:
        """(N, O, F) standardised features -> (N,), the mean over the orders. 1 is one standard deviation a feature."""
        flat = features.reshape(-1, features.shape[-1])
        return _mean_of_nearest(squared_distances(flat, self.rows), flat.shape[1]).reshape(features.shape[:2]).mean(1)


def fit_novelty(features: np.ndarray, pairs: Sequence[tuple[str, ...]], quantile: float) -> Novelty:
    """From (N, O, F) standardised features of N contexts and their pairs.

    A pair that shares a checkpoint with (nearly) all others is compared with all pairs but itself.
    """
    rows = features.reshape(-1, features.shape[-1])
    owners = [pair for pair in pairs for _ in range(features.shape[1])]
    names = sorted({name for pair in owners for name in pair})
    # Counts in floating point: exact, and multiplied by BLAS.
    member = np.array([[name in pair for name in names] for pair in owners], dtype=np.float64)
    shared = member @ member.T
    few = (shared == 0).sum(1) < NUM_NEIGHBOURS
    # Rows of the same group share all of its checkpoints.
    whole = np.diag(shared)[:, None]
    excluded = np.where(few[:, None], shared >= whole, shared > 0)
    squared = np.where(excluded, np.inf, squared_distances(rows, rows))
    distances = _mean_of_nearest(squared, rows.shape[1]).reshape(features.shape[:2]).mean(1)
    finite = distances[np.isfinite(distances)]
    # "higher": with few pairs the quantile is the largest distance, not something below it.
    limit = float(np.quantile(finite, quantile, method="higher")) if len(finite) else 0.0
    return Novelty(rows, limit)


def _mean_of_nearest(squared: np.ndarray, num_features: int) -> np.ndarray:
    """(N, M) squared distances -> (N,), infinite ones left out; infinite where all are."""
    count = min(NUM_NEIGHBOURS, squared.shape[1])
    nearest = np.partition(squared, count - 1, axis=1)[:, :count]
    known = np.isfinite(nearest)
    total = np.sqrt(np.where(known, nearest, 0.0) / max(num_features, 1)).sum(1)
    return np.where(known.any(1), total / np.maximum(known.sum(1), 1), np.inf)
