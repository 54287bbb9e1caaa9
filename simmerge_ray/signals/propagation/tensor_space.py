"""One tensor of all checkpoints: Gram matrix and sample, and the vectors that are known by both.

A vector is a coefficient vector over [base, task vectors] (see `span`) and, where that is only its projection, also its
values at the sampled coordinates. Inner products in the span come from the Gram matrix of the checkpoints. Those beyond
it are sums over the sample with weights calibrated on the Gram matrix: a third to two thirds of the error of plain
weights n/S, as measured on trimmed and randomly masked task vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from simmerge_ray.signals.propagation.kernels import add_scaled, add_scaled_difference
from simmerge_ray.signals.propagation.span import blend
from simmerge_ray.signals.signature import DENSITIES, TensorSample

_NEGLIGIBLE = 1e-9  # beyond the span by this share of the length is rounding
_ROUNDING = 1e-12  # of coefficients
_KEPT = 16  # sampled vectors of checkpoints in memory: those that the merges at hand are made of


@dataclass(frozen=True)
class VirtualTensor:
    """A vector of the size of one tensor, usually a task vector.

    coefficients: (K,) float64 over [base, task vectors], of the projection on their span. values: (S,) float64 at the
    sampled coordinates; None where the vector lies in the span, so that the coefficients say all.
    """

    coefficients: np.ndarray
    values: np.ndarray | None = None


class TensorSpace:
    """One tensor of all checkpoints: Gram matrix of [base, task vectors] and the sample, n/S times smaller.

    Without a base the mean of the checkpoints takes its place.

    gram: (K, K) float64. centre: (S,) float32, the base. samples: of K - 1 checkpoints, the base among them if any.
    """

    def __init__(self, gram: np.ndarray, centre: np.ndarray, samples: Sequence[TensorSample]) -> None:
        self.gram, self.centre, self._samples = gram, centre, samples
        self.num_elements = samples[0].num_elements
        self.weights = lru_cache(4)(self._calibrated)
        self._vector = lru_cache(_KEPT)(lambda index: self._sum([index], np.ones(len(gram))))

    @property
    def scale(self) -> float:
        return self.num_elements / len(self.centre)

    @property
    def is_whole(self) -> bool:
        return self.num_elements == len(self.centre)

    def vector(self, index: int) -> VirtualTensor:
        """The base (0), or the task vector of a checkpoint."""
        return VirtualTensor(np.eye(1, len(self.gram), index)[0])

    def with_base(self, tensor: VirtualTensor) -> VirtualTensor:
        """The weights of a task vector."""
        values = None if tensor.values is None else tensor.values + self.centre
        return VirtualTensor(tensor.coefficients + self.vector(0).coefficients, values)

    def sampled(self, tensor: VirtualTensor) -> np.ndarray:
        """Values at the sampled coordinates, (S,) float64, not to be written to."""
        if tensor.values is not None:
            return tensor.values
        used = tensor.coefficients.nonzero()[0].tolist()
        if len(used) == 1 and tensor.coefficients[used[0]] == 1.0:
            return self._vector(used[0])
        return self._sum(used, tensor.coefficients)

    def _sum(self, used: Sequence[int], coefficients: np.ndarray) -> np.ndarray:
        total = np.zeros(len(self.centre))
        for index in used:
            if index == 0:
                add_scaled(total, coefficients[0], self.centre)
            else:  # subtracted in float32, as for the Gram matrix
                add_scaled_difference(total, coefficients[index], self._samples[index - 1].values, self.centre)
        return total

    def blended(self, left: VirtualTensor, right: VirtualTensor, shares: tuple[float, float, float]) -> VirtualTensor:
        """Task vector of `s_left w_left + s_right w_right + s_base base`, from those of left and right.

        What neither has moved has not moved: a rest of rounding in front of the base would undo that.
        """
        excess = sum(shares) - 1.0
        shares = (*shares[:2], excess if abs(excess) > _ROUNDING else 0.0)
        coefficients = blend(left.coefficients, right.coefficients, shares)
        if left.values is None and right.values is None:
            return VirtualTensor(coefficients)
        values = shares[0] * self.sampled(left) + shares[1] * self.sampled(right) + shares[2] * self.centre
        return VirtualTensor(coefficients, values)

    def products(self, tensors: Sequence[VirtualTensor]) -> np.ndarray:
        """Inner products of all pairs, (T, T): `c^T G d`, and `sum_k w_k x_k y_k` where either is beyond the span."""
        found: np.ndarray = self.products_of([tensors])[0]
        return found

    def products_of(self, groups: Sequence[Sequence[VirtualTensor]]) -> np.ndarray:
        """`products` of N groups of T tensors each, (N, T, T).

        Weights of the sample are those for the checkpoints in a group, whatever the other groups hold. They are made
        once where groups of the same checkpoints follow each other.
        """
        coefficients = np.array([[tensor.coefficients for tensor in group] for group in groups])  # (N, T, K)
        num, size, width = coefficients.shape
        along = (coefficients.reshape(-1, width) @ self.gram).reshape(num, size, width)
        products = along @ coefficients.transpose(0, 2, 1)
        used = (coefficients != 0).any(1)
        for number, group in enumerate(groups):
            beyond = np.array([tensor.values is not None for tensor in group])
            if beyond.any():
                values = np.stack([self.sampled(tensor) for tensor in group])
                weights = self.weights(tuple(np.flatnonzero(used[number]).tolist()))
                by_sample = (values * weights) @ values.T
                products[number] = np.where(beyond[:, None] | beyond[None, :], by_sample, products[number])
        return products

    def _calibrated(self, used: tuple[int, ...]) -> np.ndarray:
        """Weights of the sampled coordinates under which products of some of the span's vectors are exact.

        The nearest to n/S with `sum_k w_k v_ik v_jk = G_ij`; sums of whatever else goes along with such products are
        then nearly exact, too (a calibration estimator: Deville & Saerndal 1992, doi:10.2307/2290268). (S,) float64.
        """
        if self.is_whole:
            return np.ones(len(self.centre))
        vectors = np.stack([self.sampled(self.vector(index)) for index in used])
        first, second = np.tril_indices(len(used))
        rows = np.empty((len(first), vectors.shape[1]))
        for index, vector in enumerate(vectors):
            start = index * (index + 1) // 2
            np.multiply(vector, vectors[: index + 1], out=rows[start : start + index + 1])
        missing = (self.gram[np.ix_(used, used)] - self.scale * (vectors @ vectors.T))[first, second]
        products = rows @ rows.T
        norms = np.sqrt(np.diagonal(products))
        norms = np.where(norms > 0, norms, 1.0)
        # The least change is a combination of the rows; a product that follows from others adds nothing to it.
        shares = np.linalg.lstsq(products / np.outer(norms, norms), missing / norms, rcond=1e-12)[0]
        weights: np.ndarray = self.scale + (shares / norms) @ rows
        return weights

    def threshold(self, index: int, density: float) -> float | None:
        """The exact trim threshold of a checkpoint's task vector, where the signature holds it."""
        known = self._samples[index - 1].thresholds
        return float(known[DENSITIES.index(density)]) if density in DENSITIES else None

    def fitted(self, values: np.ndarray, regressors: np.ndarray) -> VirtualTensor:
        """A vector known at the sampled coordinates, its projection on some vectors of the span by least squares.

        Args:
            values: (S,) float64. regressors: (R, K), coefficients of each.
        """
        columns = np.stack([*(self.sampled(VirtualTensor(row)) for row in regressors), values])
        # The triangle has the lengths and angles of the columns in as many rows as there are columns.
        triangle = np.asarray(np.linalg.qr(columns.T, mode="r"))
        vectors, target = triangle[:, :-1], triangle[:, -1]
        norms = np.linalg.norm(vectors, axis=0)
        norms = np.where(norms > 0, norms, 1.0)
        found = np.linalg.lstsq(vectors / norms, target, rcond=1e-12)[0] / norms
        beyond = np.linalg.norm(target - vectors @ found) > _NEGLIGIBLE * np.linalg.norm(target)
        return VirtualTensor(found @ regressors, values if beyond else None)


def tensor_space(samples: Sequence[TensorSample], gram: np.ndarray, with_base: bool) -> TensorSpace:
    """From the samples of [base, checkpoints...], or of the checkpoints, in the order of the Gram matrix."""
    mean = np.stack([sample.values for sample in samples]).mean(0, dtype=np.float64).astype(np.float32)
    return TensorSpace(gram, samples[0].values if with_base else mean, samples)
