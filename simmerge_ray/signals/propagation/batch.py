"""`second_order` for many plans at once: steps of folds, whose left is any source and whose right is a checkpoint.

A source is a row of barycentric weights over [base, checkpoints] (see `second_order`). All quadratic forms of P sources
with all checkpoints are one matrix product for each column, so a plan costs nanoseconds a column.
"""

from __future__ import annotations

import numpy as np

from simmerge_ray.plans.operators.shares import COLLINEAR_SINE, MIN_NORM
from simmerge_ray.plans.operators.specs import Arm
from simmerge_ray.signals.features import column_signal
from simmerge_ray.signals.propagation.second_order import EXACT_GROUPS, TINY, SecondOrder, blend_like
from simmerge_ray.signals.propagation.span import blend_shares
from simmerge_ray.signals.table import SignalTable
from simmerge_ray.signals.weights import NORM_FLOOR

Array = np.ndarray


def quadratic(matrix: Array, weights: Array) -> Array:
    """`a^T M a` for each row a of (P, K) weights; (P,)."""
    total: Array = np.einsum("pk,pk->p", weights @ matrix, weights)
    return total


class SecondOrderBatch:
    """The numbers of `SecondOrder`, to rounding.

    ids: of the n checkpoints, sorted; indices below are places in it. columns: the F columns that it delivers.
    """

    def __init__(self, table: SignalTable) -> None:
        self._single = SecondOrder(table)
        self.ids = table.checkpoint_ids
        self.columns = self._single.columns
        self._first = len(self._single.ids) - len(self.ids)  # 1 with a base, 0 without one

    def checkpoints(self) -> Array:
        """Weights of the checkpoints themselves, (n, K)."""
        return np.eye(len(self._single.ids))[self._first :]

    def merged(self, left: Array, right: Array, arm: Arm, weight: float) -> Array:
        """Weights of the merges of P sources with a checkpoint each.

        Args:
            left: (P, K). right: (P,) int. weight: of right.

        Returns:
            (P, K), rows of sum 1.
        """
        like = blend_like(arm)
        if like.spec.is_spherical:
            share_left, share_right = self._arc(like, left, right, weight)
        else:
            shares = blend_shares(like, weight, lambda centred: (1.0, 0.0, 1.0), self._first > 0)
            share_left, share_right = (np.full(len(left), share) for share in shares[:2])
        merged: Array = share_left[:, None] * left
        merged[np.arange(len(left)), right + self._first] += share_right
        if self._first:
            merged[:, 0] += 1.0 - merged.sum(1)
            return merged
        return merged / merged.sum(1, keepdims=True)

    def _arc(self, arm: Arm, left: Array, right: Array, weight: float) -> tuple[Array, Array]:
        """Shares of left and right of SLERP, as `blend_shares` has them; (P,) each."""
        task, place = self._single.any_task, right + self._first
        if arm.spec.uses_base and self._first:
            gram = self._single.gram("weight_l2_global", task)
            guarded = [np.maximum(v, MIN_NORM**2) for v in (quadratic(gram, left), np.diagonal(gram)[place])]
            dot = np.einsum("pk,kp->p", left, gram[:, place])
            cosine = (dot / np.sqrt(guarded[0] * guarded[1])).clip(-1.0, 1.0)
        else:
            matrix = self._single.matrix("weight_cosine_global", task)
            cosine = _cosines(matrix, left)[np.arange(len(left)), place]
        threshold = float(arm.param_dict().get("threshold", 1.0))
        straight = (np.abs(cosine) > threshold) | (np.sqrt((1.0 - cosine) * (1.0 + cosine)) < COLLINEAR_SINE)
        angle = np.arccos(np.where(straight, 0.0, cosine))
        shares = (np.where(straight, part, np.sin(part * angle) / np.sin(angle)) for part in (1.0 - weight, weight))
        share_left, share_right = shares
        return share_left, share_right

    def pairs(self, task: str) -> Array:
        """The table's own values of all ordered pairs, (F, n, n); 0 for a checkpoint with itself."""
        values = self._single.table_values(task)[:, self._first :, self._first :].copy()
        np.einsum("fii->fi", values)[:] = 0.0
        return values

    def features(self, left: Array, task: str) -> Array:
        """Unscaled features of steps of P sources with every checkpoint on the right.

        Args:
            left: (P, K).

        Returns:
            (F, P, n).
        """
        values = np.empty((len(self.columns), len(left), len(self.ids)))
        for index, column in enumerate(self.columns):
            values[index] = self._values(column, left, task)
        return values

    def _values(self, column: str, left: Array, task: str) -> Array:
        """(P, n), or what broadcasts to it."""
        signal, first = column_signal(column), self._first
        statistic = column.removeprefix(f"{signal.name}_")
        if signal.family == "divergence":
            return _divergences(self._single.matrix(column, task), left)[:, first:]
        if signal.family == "single":
            if signal.name == "task_vector_norm":
                own, others = self._norms("weight_l2_global", left)
            else:
                value = self._single.matrix(f"{signal.name}_left", task)[:, 0]
                own, others = (left @ value).clip(0.0), value[first:].clip(0.0)
            return own[:, None] if statistic == "left" else others[None]
        if signal.name == "weight_l2":
            return _distances(self._single.matrix(column, task), left)[:, first:]
        if signal.name == "task_vector_norm_ratio":
            own, others = (np.log(np.maximum(v, NORM_FLOOR)) for v in self._norms(f"weight_l2_{statistic}", left))
            ratio: Array = own[:, None] - others[None]
            return ratio
        if signal.name == "task_vector_cosine" and statistic in EXACT_GROUPS:
            return _cosines(self._single.gram(f"weight_l2_{statistic}", task), left)[:, first:]
        return _cosines(self._single.matrix(column, task), left)[:, first:]

    def _norms(self, column: str, left: Array) -> tuple[Array, Array]:
        """Norms of the task vectors of P sources and of the checkpoints, (P,) and (n,)."""
        matrix = self._single.matrix(column, self._single.any_task)
        return _distances(matrix, left)[:, 0], matrix[1:, 0]


def _divergences(divergence: Array, left: Array) -> Array:
    """`quadratic_divergence` of P sources and the K points themselves, (P, K)."""
    both = divergence + divergence.T
    own = 0.25 * quadratic(both, left)[:, None] + 0.25 * np.diagonal(both)
    found: Array = (left @ divergence - own).clip(0.0)
    return found


def _distances(distance: Array, left: Array) -> Array:
    """`mixed_distance`, (P, K)."""
    return np.sqrt(2.0 * _divergences(0.5 * distance * distance, left))


def _cosines(cosine: Array, left: Array) -> Array:
    """`closed_cosine`, (P, K)."""
    norms = quadratic(cosine, left).clip(0.0)[:, None] * np.diagonal(cosine).clip(0.0)
    defined = norms > TINY
    found: Array = np.where(defined, (left @ cosine / np.sqrt(np.where(defined, norms, 1.0))).clip(-1.0, 1.0), 0.0)
    return found
