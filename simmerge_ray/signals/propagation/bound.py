"""The paper's convexity bounds: every signal of an intermediate is the weighted mean of its sources' signals."""

from __future__ import annotations

import numpy as np

from simmerge_ray.signals.propagation.interface import Intermediate
from simmerge_ray.signals.propagation.second_order import Formula, SecondOrder
from simmerge_ray.signals.table import SignalTable


def _mean(both: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return both


class Bound(SecondOrder):
    """`f(m, n) = sum_ij a_i b_j f(i, j)` with a, b the shares of the checkpoints in m and n (Bolton et al. 2026,
    arXiv:2601.09473).

    By convexity an upper bound of KL, l2 and norms where the intermediate is the mixture that the signal is convex in
    (probabilities, or logits for KL to it; weights for l2), and a lower bound of cosines of vectors of equal norm. It
    knows no operator: every step counts as the average `(1 - w) left + w right`. Entropy and loss are weighted means,
    which are approximate.
    """

    name = "bound"

    def __init__(self, table: SignalTable) -> None:
        super().__init__(table)
        self.columns = tuple(column for column in self.columns if not column.startswith("task_vector_norm_ratio"))

    def _blended(self, source: Intermediate) -> np.ndarray:
        weight = source.constant_weight
        return (1.0 - weight) * self.barycentric(source.left) + weight * self.barycentric(source.right)

    def _formula(self, column: str, task: str) -> tuple[Formula, np.ndarray]:
        return _mean, self.matrix(column, task)
