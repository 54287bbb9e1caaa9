"""Quadratic forms of the pair table in barycentric weights over [base, checkpoints].

A source m is `sum_i a_i w_i` with `sum_i a_i = 1`: exact for averages and sums of task vectors, and for SLERP where one
angle holds for the whole model. Squared distances, and KL to second order, are then quadratic forms of the table's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from simmerge_ray.plans.operators.specs import Arm, make_arm
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.signals.features import column_signal
from simmerge_ray.signals.propagation.interface import (
    Intermediate,
    PlanStep,
    Source,
    mean_columns,
    one_by_one,
    propagated,
)
from simmerge_ray.signals.propagation.span import Products, blend, blend_shares
from simmerge_ray.signals.table import PairSignals, SignalTable
from simmerge_ray.signals.weights import NORM_FLOOR

Array = np.ndarray
TINY = float(np.finfo(np.float64).tiny)
EXACT_GROUPS = ("global", "attention", "mlp", "embedding", "norm")  # sums over coordinates, so distances are exact


def quadratic_divergence(divergence: Array, left: Array, right: Array) -> float:
    """`KL(m || n) ~ sum_ij a_i b_j KL_ij - a^T J a / 4 - b^T J b / 4`, `J_ij = KL_ij + KL_ji`, clamped at 0.

    Exact where KL is half a squared distance of points that mix linearly, whose Hessian is the same everywhere.

    Args:
        divergence: (K, K). left, right: (K,), each of sum 1.
    """
    both = divergence + divergence.T
    return max(0.0, float(left @ divergence @ right - 0.25 * (left @ both @ left) - 0.25 * (right @ both @ right)))


def mixed_distance(distance: Array, left: Array, right: Array) -> float:
    """`|m - n|^2 = a^T D b - a^T D a / 2 - b^T D b / 2`, D = distance^2.

    Args:
        distance: (K, K). left, right: (K,), each of sum 1.
    """
    squares = distance * distance
    return math.sqrt(2.0 * quadratic_divergence(0.5 * squares, left, right))


def centred_gram(distance: Array) -> Array:
    """`<d_i, d_j> = (|d_i|^2 + |d_j|^2 - |d_i - d_j|^2) / 2`, d from the first point; (K, K)."""
    squares = distance * distance
    gram: Array = 0.5 * (squares[:1] + squares[:, :1] - squares)
    return gram


def closed_cosine(cosine: Array, left: Array, right: Array) -> float:
    """`a^T C b / sqrt(a^T C a  b^T C b)`: the cosine of two sums of vectors, exact where their norms are equal."""
    norms = max(float(left @ cosine @ left), 0.0) * max(float(right @ cosine @ right), 0.0)
    return min(1.0, max(-1.0, float(left @ cosine @ right) / math.sqrt(norms))) if norms > TINY else 0.0


def blend_like(arm: Arm) -> Arm:
    """The blend that stands for an operator (see `OperatorSpec.stand_in`), itself where it has `shares`."""
    if arm.spec.shares is not None:
        return arm
    if arm.spec.stand_in != "task_arithmetic":
        return make_arm(arm.spec.stand_in)
    params = arm.param_dict()  # a normalised sum is an average
    return make_arm("linear") if params["normalize"] else make_arm("task_arithmetic", {"scale": params["scale"]})


class SecondOrder:
    """Formulas above, one matrix of the table at a time; operators that are no blend count as one (`blend_like`).

    Entropy and loss are weighted means, which are approximate (clamped at 0: a sum of task vectors extrapolates).
    """

    name = "second_order"

    def __init__(self, table: SignalTable) -> None:
        self._table = table
        self.base = table.provenance.get("base")
        self.ids = (*((self.base,) if self.base is not None else ()), *table.checkpoint_ids)
        columns = mean_columns(self.base is not None, without=("sign_conflict", "trimmed_overlap"))
        # Means over tensors of a logarithm do not follow from means of norms.
        ratio = "task_vector_norm_ratio_"
        self.columns = tuple(c for c in columns if not c.startswith(ratio) or c.removeprefix(ratio) in EXACT_GROUPS)
        self._values: dict[str, Array] = {}
        self._matrices: dict[tuple[str, str], Array] = {}
        self._grams: dict[tuple[str, str], Array] = {}
        self._weights: dict[Source, Array] = {}

    def steps(self, plan: MergePlan, task: str, first: int = 0) -> list[PairSignals]:
        return propagated(plan, task, self._table, self.columns, lambda a, b: self._between(a, b, task), first=first)

    def batch(self, steps: Sequence[PlanStep], columns: Sequence[str], num_threads: int) -> Array:
        return one_by_one(self, steps, columns, num_threads)

    def barycentric(self, source: Source) -> Array:
        """Weights over [base, checkpoints], or over the checkpoints where there is no base; sum 1."""
        if source not in self._weights:
            self._weights[source] = self._blended(source) if isinstance(source, Intermediate) else self._one_hot(source)
        return self._weights[source]

    def _one_hot(self, name: str) -> Array:
        return (np.array(self.ids) == name).astype(np.float64)

    def _blended(self, source: Intermediate) -> Array:
        left, right = self.barycentric(source.left), self.barycentric(source.right)
        with_base = self.base is not None
        shares = blend_shares(blend_like(source.arm), source.constant_weight, self._products(left, right), with_base)
        merged = blend(left, right, shares) if with_base else shares[0] * left + shares[1] * right
        if with_base:
            merged[0] += 1.0 - merged.sum()  # SLERP also lengthens the base, which no weights of sum 1 can say
            return merged
        weights: Array = merged / merged.sum()
        return weights

    def _products(self, left: Array, right: Array) -> Products:
        def products(centred: bool) -> tuple[float, float, float]:
            if not centred:
                return 1.0, closed_cosine(self.matrix("weight_cosine_global", self.any_task), left, right), 1.0
            gram = self.gram("weight_l2_global", self.any_task)
            return float(left @ gram @ left), float(left @ gram @ right), float(right @ gram @ right)

        return products

    @cached_property
    def any_task(self) -> str:
        return self._table.tasks[0]

    def _between(self, left: Source, right: Source, task: str) -> Mapping[str, float]:
        a, b = self.barycentric(left), self.barycentric(right)
        return {column: self._value(column, a, b, task) for column in self.columns}

    def _value(self, column: str, left: Array, right: Array, task: str) -> float:
        signal = column_signal(column)
        statistic = column.removeprefix(f"{signal.name}_")
        if signal.family == "divergence":
            return quadratic_divergence(self.matrix(column, task), left, right)
        if signal.family == "single":
            weights = left if statistic == "left" else right
            if signal.name == "task_vector_norm":
                return self._norm("weight_l2_global", weights)
            return max(0.0, float(self.matrix(f"{signal.name}_left", task)[:, 0] @ weights))
        if signal.name == "weight_l2":
            return mixed_distance(self.matrix(column, task), left, right)
        if signal.name == "task_vector_norm_ratio":
            norms = [max(self._norm(f"weight_l2_{statistic}", weights), NORM_FLOOR) for weights in (left, right)]
            return math.log(norms[0]) - math.log(norms[1])
        if signal.name == "task_vector_cosine" and statistic in EXACT_GROUPS:
            return closed_cosine(self.gram(f"weight_l2_{statistic}", task), left, right)
        return closed_cosine(self.matrix(column, task), left, right)

    def _norm(self, column: str, weights: Array) -> float:
        """Norm of the task vector over the base's, from distances."""
        return mixed_distance(self.matrix(column, self.any_task), weights, self._one_hot(str(self.base)))

    def matrix(self, column: str, task: str) -> Array:
        """(K, K) of a column over [base, checkpoints]; a checkpoint with itself has cosine 1 and no distance.

        Task vectors have no row of the base: its cosines are 0, as if there were nothing of it. A value of a single
        checkpoint stands in its whole row.
        """
        if (column, task) not in self._matrices:
            signal, found = column_signal(column), self.table_values(task)[self.columns.index(column)]
            matrix = np.where(np.isnan(found), np.diag(np.full(len(found), float("cosine" in column))), found)
            if signal.family == "single":
                np.fill_diagonal(matrix, matrix[:, 0])
                matrix[0, 0] = matrix[0, 1]
            if signal.family == "task vectors" and self.base is not None:
                matrix[0, 0] = 0.0
            self._matrices[column, task] = matrix
        return self._matrices[column, task]

    def gram(self, column: str, task: str) -> Array:
        """`centred_gram` of a column of distances."""
        if (column, task) not in self._grams:
            self._grams[column, task] = centred_gram(self.matrix(column, task))
        return self._grams[column, task]

    def table_values(self, task: str) -> Array:
        """(F, K, K), the table's own values over [base, checkpoints]; NaN where it has none."""
        if task not in self._values:
            values, rows = np.full((len(self.ids), len(self.ids), len(self.columns)), np.nan), self._table.rows
            for i, left in enumerate(self.ids):
                for j, right in enumerate(self.ids):
                    if i != j:
                        found = rows[left, right, task].features
                        values[i, j] = [found.get(column, np.nan) for column in self.columns]
            self._values[task] = np.ascontiguousarray(values.transpose(2, 0, 1))
        return self._values[task]
