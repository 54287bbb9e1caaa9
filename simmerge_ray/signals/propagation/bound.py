"""The paper's convexity bounds: every signal of an intermediate is the weighted mean of its sources' signals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from simmerge_ray.signals.features import column_signal
from simmerge_ray.signals.propagation.interface import Propagator, Source, SourcePair, mean_columns
from simmerge_ray.signals.table import SignalTable


def member_shares(source: Source) -> dict[str, float]:
    """How much of each checkpoint is in a source when every step is the average `(1 - w) left + w right`; sum 1."""
    if isinstance(source, str):
        return {source: 1.0}
    shares: dict[str, float] = {}
    for part, weight in ((source.left, 1.0 - source.constant_weight), (source.right, source.constant_weight)):
        for member, share in member_shares(part).items():
            shares[member] = shares.get(member, 0.0) + weight * share
    return shares


class Bound(Propagator):
    """`f(m, n) = sum_ij a_i b_j f(i, j)` with a, b the shares of the checkpoints in m and n (Bolton et al. 2026,
    arXiv:2601.09473).

    By convexity an upper bound of KL, l2 and norms where the intermediate is the mixture that the signal is convex in
    (probabilities, or logits for KL to it; weights for l2), and a lower bound of cosines of vectors of equal norm. It
    knows no operator: every step counts as an average. Entropy and loss are weighted means, which are approximate.
    """

    name = "bound"

    def __init__(self, table: SignalTable) -> None:
        with_base = table.provenance.get("base") is not None
        without = ("task_vector_norm_ratio", "sign_conflict", "trimmed_overlap")
        super().__init__(table, mean_columns(with_base, without))

    def _features(self, pairs: Sequence[SourcePair], columns: Sequence[str], num_threads: int) -> np.ndarray:
        features = [self._between(pair.left, pair.right, pair.task) for pair in pairs]
        return np.array([[of_pair[column] for of_pair in features] for column in columns])

    def _between(self, left: Source, right: Source, task: str) -> Mapping[str, float]:
        left_shares, right_shares = member_shares(left), member_shares(right)
        features = dict.fromkeys(self.columns, 0.0)
        for i, a in left_shares.items():
            for j, b in right_shares.items():
                for column, value in self._pair(i, j, task).items():
                    features[column] += a * b * value
        return features

    def _pair(self, left: str, right: str, task: str) -> Mapping[str, float]:
        if left != right:
            features = self._table.get(left, right, task).features
            return {column: features[column] for column in self.columns}
        other = next(name for name in self._table.checkpoint_ids if name != left)
        features = self._table.get(left, other, task).features
        return {column: _with_itself(column, features) for column in self.columns}


def _with_itself(column: str, features: Mapping[str, float]) -> float:
    """A signal of a checkpoint with itself; single values from any of its rows, where it stands on the left."""
    signal = column_signal(column)
    if signal.family == "single":
        return features[f"{signal.name}_left"]
    return 1.0 if "cosine" in signal.name else 0.0
