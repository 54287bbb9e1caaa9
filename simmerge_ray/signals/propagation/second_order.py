"""Quadratic forms of the pair table in barycentric weights over [base, checkpoints].

A source m is `sum_i a_i w_i` with `sum_i a_i = 1`: exact for averages and sums of task vectors, and for SLERP where one
angle holds for the whole model. Squared distances, and KL to second order, are then quadratic forms of the table's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from simmerge_ray.plans.operators.specs import Arm, make_arm
from simmerge_ray.signals.features import column_signal
from simmerge_ray.signals.propagation.interface import Intermediate, Propagator, Source, SourcePair, mean_columns
from simmerge_ray.signals.propagation.span import Products, blend, blend_shares
from simmerge_ray.signals.table import SignalTable
from simmerge_ray.signals.weights import NORM_FLOOR

_TINY = float(np.finfo(np.float64).tiny)
_EXACT_GROUPS = ("global", "attention", "mlp", "embedding", "norm")  # sums over coordinates, so distances are exact


def quadratic(matrix: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`a^T M a` for each row a of (P, K) weights; (P,)."""
    total: np.ndarray = np.einsum("pk,pk->p", weights @ matrix, weights)
    return total


class Sides(Protocol):
    """Left and right sources by their weights a and b, and the forms of a (K, K) matrix in them; results broadcast."""

    def products(self, matrix: np.ndarray) -> np.ndarray:
        """`a^T M b`."""
        ...

    def squares(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`a^T M a` and `b^T M b`."""
        ...

    def means(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`a^T v` and `b^T v` of (K,) values."""
        ...


@dataclass(frozen=True)
class PairedSides:
    """P pairs. left, right: (P, K), rows of sum 1. Results are (P,)."""

    left: np.ndarray
    right: np.ndarray

    def products(self, matrix: np.ndarray) -> np.ndarray:
        return np.asarray(np.einsum("pk,pk->p", self.left @ matrix, self.right))

    def squares(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return quadratic(matrix, self.left), quadratic(matrix, self.right)

    def means(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.left @ values, self.right @ values


@dataclass(frozen=True)
class AllPoints:
    """P sources with each of the K points of the table. left: (P, K), rows of sum 1. Results are (P, K)."""

    left: np.ndarray

    def products(self, matrix: np.ndarray) -> np.ndarray:
        return np.asarray(self.left @ matrix)

    def squares(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return quadratic(matrix, self.left)[:, None], np.diagonal(matrix)

    def means(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (self.left @ values)[:, None], values


def quadratic_divergence(divergence: np.ndarray, sides: Sides) -> np.ndarray:
    """`KL(m || n) ~ sum_ij a_i b_j KL_ij - a^T J a / 4 - b^T J b / 4`, `J_ij = KL_ij + KL_ji`, clamped at 0.

    Exact where KL is half a squared distance of points that mix linearly, whose Hessian is the same everywhere.
    """
    left, right = sides.squares(divergence + divergence.T)
    return np.asarray((sides.products(divergence) - 0.25 * left - 0.25 * right).clip(0.0))


def mixed_distance(distance: np.ndarray, sides: Sides) -> np.ndarray:
    """`|m - n|^2 = a^T D b - a^T D a / 2 - b^T D b / 2`, D = distance^2."""
    return np.sqrt(2.0 * quadratic_divergence(0.5 * distance * distance, sides))


def closed_cosine(cosine: np.ndarray, sides: Sides) -> np.ndarray:
    """`a^T C b / sqrt(a^T C a  b^T C b)`: the cosine of two sums of vectors, exact where their norms are equal."""
    left, right = sides.squares(cosine)
    norms = left.clip(0.0) * right.clip(0.0)
    defined = norms > _TINY
    return np.where(defined, (sides.products(cosine) / np.sqrt(np.where(defined, norms, 1.0))).clip(-1.0, 1.0), 0.0)


def centred_gram(distance: np.ndarray) -> np.ndarray:
    """`<d_i, d_j> = (|d_i|^2 + |d_j|^2 - |d_i - d_j|^2) / 2`, d from the first point; (K, K)."""
    squares = distance * distance
    gram: np.ndarray = 0.5 * (squares[:1] + squares[:, :1] - squares)
    return gram


def blend_like(arm: Arm) -> Arm:
    """The blend that stands for an operator (see `OperatorSpec.stand_in`), itself where it has `shares`."""
    if arm.spec.shares is not None:
        return arm
    if arm.spec.stand_in != "task_arithmetic":
        return make_arm(arm.spec.stand_in)
    params = arm.param_dict()  # a normalised sum is an average
    return make_arm("linear") if params["normalize"] else make_arm("task_arithmetic", {"scale": params["scale"]})


class SecondOrder(Propagator):
    """Formulas above, one matrix of the table at a time; operators that are no blend count as one (`blend_like`).

    Entropy and loss are weighted means, which are approximate (clamped at 0: a sum of task vectors extrapolates).
    """

    name = "second_order"

    def __init__(self, table: SignalTable) -> None:
        self.base = table.provenance.get("base")
        self.ids = (*((self.base,) if self.base is not None else ()), *table.checkpoint_ids)
        columns = mean_columns(self.base is not None, without=("sign_conflict", "trimmed_overlap"))
        # Means over tensors of a logarithm do not follow from means of norms.
        ratio = "task_vector_norm_ratio_"
        columns = tuple(c for c in columns if not c.startswith(ratio) or c.removeprefix(ratio) in _EXACT_GROUPS)
        super().__init__(table, columns)
        self._values: dict[str, np.ndarray] = {}
        self._matrices: dict[tuple[str, str], np.ndarray] = {}
        self._grams: dict[tuple[str, str], np.ndarray] = {}
        self._weights: dict[Source, np.ndarray] = {}

    def _features(self, pairs: Sequence[SourcePair], columns: Sequence[str], num_threads: int) -> np.ndarray:
        values = np.empty((len(columns), len(pairs)))
        for task in dict.fromkeys(pair.task for pair in pairs):
            places = [place for place, pair in enumerate(pairs) if pair.task == task]
            sides = PairedSides(
                np.stack([self.barycentric(pairs[place].left) for place in places]),
                np.stack([self.barycentric(pairs[place].right) for place in places]),
            )
            for index, column in enumerate(columns):
                values[index, places] = self.values(column, sides, task)
        return values

    def barycentric(self, source: Source) -> np.ndarray:
        """Weights over [base, checkpoints], or over the checkpoints where there is no base; sum 1."""
        if source not in self._weights:
            self._weights[source] = self._blended(source) if isinstance(source, Intermediate) else self._one_hot(source)
        return self._weights[source]

    def _one_hot(self, name: str) -> np.ndarray:
        return (np.array(self.ids) == name).astype(np.float64)

    def _blended(self, source: Intermediate) -> np.ndarray:
        left, right = self.barycentric(source.left), self.barycentric(source.right)
        with_base = self.base is not None
        shares = blend_shares(blend_like(source.arm), source.constant_weight, self._products(left, right), with_base)
        merged = blend(left, right, shares) if with_base else shares[0] * left + shares[1] * right
        if with_base:
            merged[0] += 1.0 - merged.sum()  # SLERP also lengthens the base, which no weights of sum 1 can say
            return merged
        weights: np.ndarray = merged / merged.sum()
        return weights

    def _products(self, left: np.ndarray, right: np.ndarray) -> Products:
        def products(centred: bool) -> tuple[float, float, float]:
            if not centred:
                sides = PairedSides(left[None], right[None])
                return 1.0, float(closed_cosine(self.matrix("weight_cosine_global", self.any_task), sides)[0]), 1.0
            gram = self.gram("weight_l2_global", self.any_task)
            return float(left @ gram @ left), float(left @ gram @ right), float(right @ gram @ right)

        return products

    @cached_property
    def any_task(self) -> str:
        return self._table.tasks[0]

    def values(self, column: str, sides: Sides, task: str) -> np.ndarray:
        """A column for all sides, in their shape or what broadcasts to it."""
        signal = column_signal(column)
        statistic = column.removeprefix(f"{signal.name}_")
        if signal.family == "divergence":
            return quadratic_divergence(self.matrix(column, task), sides)
        if signal.family == "single":
            if signal.name == "task_vector_norm":
                both = self._norms("global", sides)
            else:
                both = sides.means(self.matrix(f"{signal.name}_left", task)[:, 0])
            return np.asarray(both[statistic == "right"].clip(0.0))
        if signal.name == "weight_l2":
            return mixed_distance(self.matrix(column, task), sides)
        if signal.name == "task_vector_norm_ratio":
            left, right = (np.log(np.maximum(norms, NORM_FLOOR)) for norms in self._norms(statistic, sides))
            return np.asarray(left - right)
        if signal.name == "task_vector_cosine" and statistic in _EXACT_GROUPS:
            return closed_cosine(self.gram(f"weight_l2_{statistic}", task), sides)
        return closed_cosine(self.matrix(column, task), sides)

    def _norms(self, group: str, sides: Sides) -> tuple[np.ndarray, np.ndarray]:
        """Norms of both task vectors over the base's, from distances to the base."""
        squares = self.matrix(f"weight_l2_{group}", self.any_task) ** 2
        own, from_base = sides.squares(squares), sides.means(squares[:, 0])
        left, right = (np.sqrt((mean - 0.5 * square).clip(0.0)) for mean, square in zip(from_base, own, strict=True))
        return left, right

    def matrix(self, column: str, task: str) -> np.ndarray:
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

    def gram(self, column: str, task: str) -> np.ndarray:
        """`centred_gram` of a column of distances."""
        if (column, task) not in self._grams:
            self._grams[column, task] = centred_gram(self.matrix(column, task))
        return self._grams[column, task]

    def table_values(self, task: str) -> np.ndarray:
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
