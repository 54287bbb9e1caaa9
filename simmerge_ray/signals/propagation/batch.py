"""`second_order` for many plans at once: steps of folds, whose left is any source and whose right is a checkpoint.

A source is a row of barycentric weights over [base, checkpoints] (see `second_order`). All quadratic forms of P sources
with all checkpoints are one matrix product for each column, so a plan costs nanoseconds a column.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simmerge_ray.plans.operators.shares import COLLINEAR_SINE, MIN_NORM
from simmerge_ray.plans.operators.specs import Arm
from simmerge_ray.signals.propagation.second_order import SecondOrder, blend_like, point_forms
from simmerge_ray.signals.propagation.span import blend_shares
from simmerge_ray.signals.table import SignalTable


class SecondOrderBatch:
    """The numbers of `SecondOrder`, to rounding.

    ids: of the n checkpoints, sorted; indices below are places in it. columns: the F columns that it delivers.
    """

    def __init__(self, table: SignalTable) -> None:
        self._table, self._single = table, SecondOrder(table)
        self.ids = table.checkpoint_ids
        self.columns = self._single.columns
        self._first = len(self._single.ids) - len(self.ids)  # 1 with a base, 0 without one

    def checkpoints(self) -> np.ndarray:
        """Weights of the checkpoints themselves, (n, K)."""
        return np.eye(len(self._single.ids))[self._first :]

    def merged(self, left: np.ndarray, right: np.ndarray, arm: Arm, weight: float) -> np.ndarray:
        """Weights (P, K) of the merges of P sources (P, K) with a checkpoint each, (P,) int; weight: of right."""
        like = blend_like(arm)
        if like.spec.is_spherical:
            share_left, share_right = self._arc(like, left, right, weight)
        else:
            shares = blend_shares(like, weight, lambda centred: (1.0, 0.0, 1.0), self._first > 0)
            share_left, share_right = (np.full(len(left), share) for share in shares[:2])
        merged: np.ndarray = share_left[:, None] * left
        merged[np.arange(len(left)), right + self._first] += share_right
        if self._first:
            merged[:, 0] += 1.0 - merged.sum(1)
            return merged
        return merged / merged.sum(1, keepdims=True)

    def _arc(self, arm: Arm, left: np.ndarray, right: np.ndarray, weight: float) -> tuple[np.ndarray, np.ndarray]:
        """Shares of left and right of SLERP, as `blend_shares` has them; (P,) each."""
        centred = arm.spec.uses_base and self._first > 0
        both, own, others = point_forms(left, self._first, self._single.angles(centred))
        guarded = [np.maximum(squares, MIN_NORM**2) for squares in (own[:, 0], others[right])]
        cosine = (both[np.arange(len(left)), right] / np.sqrt(guarded[0] * guarded[1])).clip(-1.0, 1.0)
        threshold = float(arm.param_dict().get("threshold", 1.0))
        straight = (np.abs(cosine) > threshold) | (np.sqrt((1.0 - cosine) * (1.0 + cosine)) < COLLINEAR_SINE)
        angle = np.arccos(np.where(straight, 0.0, cosine))
        shares = (np.where(straight, part, np.sin(part * angle) / np.sin(angle)) for part in (1.0 - weight, weight))
        share_left, share_right = shares
        return share_left, share_right

    def pairs(self, left: np.ndarray, task: str, columns: Sequence[str]) -> np.ndarray:
        """The table's own values (F, P, n) of P checkpoints, (P,) int, with every one on the right; NaN for a
        checkpoint with itself."""
        values = np.empty((len(columns), len(left), len(self.ids)))
        for index, column in enumerate(columns):
            values[index] = self._table.matrix(column, task)[left + self._first, self._first :]
        return values

    def features(self, left: np.ndarray, task: str, columns: Sequence[str]) -> np.ndarray:
        """Unscaled features (F, P, n) of steps of P sources (P, K) with every checkpoint on the right."""
        values = np.empty((len(columns), len(left), len(self.ids)))
        for index, column in enumerate(columns):
            formula, matrix = self._single.formula(column, task)
            values[index] = formula(*point_forms(left, self._first, matrix))
        return values
