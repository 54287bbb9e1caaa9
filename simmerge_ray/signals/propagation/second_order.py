"""Quadratic forms of the pair table in barycentric weights over [base, checkpoints].

A source m is `sum_i a_i w_i` with `sum_i a_i = 1`: exact for averages and sums of task vectors, and for SLERP where one
angle holds for the whole model. Squared distances, and KL to second order, are then quadratic forms of the table's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property, lru_cache

import numpy as np

from simmerge_ray.plans.operators.specs import Arm, make_arm
from simmerge_ray.signals.features import column_signal, feature_columns
from simmerge_ray.signals.propagation.interface import Intermediate, Propagator, Source, SourcePair
from simmerge_ray.signals.propagation.span import Products, blend, blend_shares
from simmerge_ray.signals.table import SignalTable
from simmerge_ray.signals.weights import NORM_FLOOR

_TINY = float(np.finfo(np.float64).tiny)
_BEYOND_MEANS = ("median", "q10", "q90", "min", "sd")  # do not follow from a table of means
_EXACT_GROUPS = ("global", "attention", "mlp", "embedding", "norm")  # sums over coordinates, so distances are exact

Forms = tuple[np.ndarray, np.ndarray, np.ndarray]  # `a^T M b`, `a^T M a`, `b^T M b`; they broadcast
Formula = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # of forms


def paired_forms(left: np.ndarray, right: np.ndarray, matrix: np.ndarray) -> Forms:
    """Forms of P pairs of sources by their weights a and b, (P, K), in one matrix (K, K) or in several; (..., P)."""
    along = left @ matrix
    own, others = (np.einsum("...pk,pk->...p", *one) for one in ((along, left), (right @ matrix, right)))
    return np.einsum("...pk,pk->...p", along, right), own, others


def point_forms(left: np.ndarray, first: int, matrix: np.ndarray) -> Forms:
    """Forms of P sources (P, K) with each point of the table from `first` on, in one matrix; (P, K - first)."""
    along = left @ matrix
    return along[:, first:], np.einsum("pk,pk->p", along, left)[:, None], np.diagonal(matrix)[first:]


def quadratic_divergence(both: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`KL(m || n) ~ sum_ij a_i b_j KL_ij - a^T KL a / 2 - b^T KL b / 2`, clamped at 0.

    Exact where KL is half a squared distance of points that mix linearly, whose Hessian is the same everywhere.
    """
    return np.asarray((both - (0.5 * left + 0.5 * right)).clip(0.0))


def mixed_distance(both: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`|m - n|^2 = a^T D b - a^T D a / 2 - b^T D b / 2`, from the forms of the squared distances D."""
    return np.sqrt(quadratic_divergence(both, left, right))


def closed_cosine(both: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`a^T C b / sqrt(a^T C a  b^T C b)`: the cosine of two sums of vectors, exact where their norms are equal."""
    norms = left.clip(0.0) * right.clip(0.0)
    defined = norms > _TINY
    return np.where(defined, (both / np.sqrt(np.where(defined, norms, 1.0))).clip(-1.0, 1.0), 0.0)


def _log_ratio(both: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    logs = [np.log(np.sqrt(square.clip(0.0)).clip(NORM_FLOOR)) for square in (left, right)]
    return np.asarray(logs[0] - logs[1])


def _left_norm(both: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.sqrt(left.clip(0.0))


def _right_norm(both: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.sqrt(right.clip(0.0))


def _mean(both: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.asarray(both.clip(0.0))


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

    def __init__(self, table: SignalTable, among: Collection[str] | None = None) -> None:
        """among: the checkpoints that may be asked for; None: all."""
        self.base = table.provenance.get("base")
        every = (*((self.base,) if self.base is not None else ()), *table.checkpoint_ids)
        kept = [place for place, name in enumerate(every) if among is None or name == self.base or name in among]
        self.ids = tuple(every[place] for place in kept)
        self._rows = None if len(kept) == len(every) else np.ix_(kept, kept)
        followed = [
            column
            for column in feature_columns(self.base is not None)
            if not column.endswith(_BEYOND_MEANS) and not column.startswith(("sign_conflict", "trimmed_overlap"))
        ]
        # Means over tensors of a logarithm do not follow from means of norms.
        ratio = "task_vector_norm_ratio_"
        columns = tuple(c for c in followed if not c.startswith(ratio) or c.removeprefix(ratio) in _EXACT_GROUPS)
        super().__init__(table, columns)
        self._weights: dict[Source, np.ndarray] = {}
        self.matrix = lru_cache(None)(self._matrix)
        self.gram = lru_cache(None)(self._gram)
        self.formula = lru_cache(None)(self._formula)
        self._stacked = lru_cache(8)(self._stack)

    def among(self, ids: Collection[str]) -> Propagator:
        """With matrices of these checkpoints and the base alone: of a thousand, a shortlist names a part."""
        few = SecondOrder(self._table, ids)
        return self if len(few.ids) == len(self.ids) else few

    def _features(self, pairs: Sequence[SourcePair], columns: Sequence[str], num_threads: int) -> np.ndarray:
        values = np.empty((len(columns), len(pairs)))
        for task in dict.fromkeys(pair.task for pair in pairs):
            places = [place for place, pair in enumerate(pairs) if pair.task == task]
            left = np.stack([self.barycentric(pairs[place].left) for place in places])
            right = np.stack([self.barycentric(pairs[place].right) for place in places])
            for formula, rows, matrices in self._stacked(tuple(columns), task):
                values[np.ix_(rows, places)] = formula(*paired_forms(left, right, matrices))
        return values

    def _stack(self, columns: Sequence[str], task: str) -> list[tuple[Formula, list[int], np.ndarray]]:
        """Every formula with the places of its columns and their matrices, (F, K, K)."""
        rows: dict[Formula, list[int]] = {}
        for row, column in enumerate(columns):
            rows.setdefault(self.formula(column, task)[0], []).append(row)
        return [
            (formula, found, np.stack([self.formula(columns[row], task)[1] for row in found]))
            for formula, found in rows.items()
        ]

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
            both, own, others = paired_forms(left[None], right[None], self.angles(centred))
            return float(own[0]), float(both[0]), float(others[0])

        return products

    def angles(self, centred: bool) -> np.ndarray:
        """(K, K) products of the task vectors, or of the weights scaled to norm 1."""
        return self.gram("global", self.any_task) if centred else self.matrix("weight_cosine_global", self.any_task)

    @cached_property
    def any_task(self) -> str:
        return self._table.tasks[0]

    def _formula(self, column: str, task: str) -> tuple[Formula, np.ndarray]:
        """What a column is of the forms of which (K, K) matrix. Norms of task vectors follow from distances."""
        signal = column_signal(column)
        statistic = column.removeprefix(f"{signal.name}_")
        if signal.name == "task_vector_norm":
            return _right_norm if statistic == "right" else _left_norm, self.gram("global", self.any_task)
        if signal.name == "task_vector_norm_ratio":
            return _log_ratio, self.gram(statistic, self.any_task)
        if signal.name == "task_vector_cosine" and statistic in _EXACT_GROUPS:
            return closed_cosine, self.gram(statistic, task)
        matrix = self.matrix(column, task)
        if signal.name == "weight_l2":
            return mixed_distance, matrix * matrix
        return {"divergence": quadratic_divergence, "single": _mean}.get(signal.family, closed_cosine), matrix

    def _matrix(self, column: str, task: str) -> np.ndarray:
        """(K, K) of a column over [base, checkpoints]; a checkpoint with itself has cosine 1 and no distance.

        Task vectors have no row of the base: its cosines are 0, as if there were nothing of it. A value of a single
        checkpoint stands in its whole row or, of the right one, column.
        """
        signal, found = column_signal(column), self._table.matrix(column, task)
        matrix = np.where(np.isnan(found), np.diag(np.full(len(found), float("cosine" in column))), found)
        if signal.family == "single":
            by_row = matrix.T if column.endswith("_right") else matrix
            np.fill_diagonal(matrix, by_row[:, 0])
            matrix[0, 0] = by_row[0, 1]
        if signal.family == "task vectors" and self.base is not None:
            matrix[0, 0] = 0.0
        return matrix if self._rows is None else matrix[self._rows]

    def _gram(self, group: str, task: str) -> np.ndarray:
        """`centred_gram` of the distances of a group of tensors."""
        return centred_gram(self.matrix(f"weight_l2_{group}", task))
