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

from simmerge_ray.propagation.span import blend
from simmerge_ray.signals.signature import DENSITIES, TensorSample

Array = np.ndarray
_NEGLIGIBLE = 1e-9  # beyond the span by this share of the length is rounding
_ROUNDING = 1e-12  # of coefficients


@dataclass(frozen=True)
class VirtualTensor:
    """A vector of the size of one tensor, usually a task vector.

    coefficients: (K,) float64 over [base, task vectors], of the projection on their span. values: (S,) float64 at the
    sampled coordinates; None where the vector lies in the span, so that the coefficients say all.
    """

    coefficients: Array
    values: Array | None = None


class TensorSpace:
    """One tensor of all checkpoints: Gram matrix of [base, task vectors] and the sample, n/S times smaller.

    Without a base the mean of the checkpoints takes its place.

    gram: (K, K) float64. centre: (S,) float32, the base. values: (S,) float32 of each of K - 1 checkpoints.
    thresholds: smallest magnitude that trimming keeps of the whole task vector, by density, of each.
    """

    def __init__(
        self, gram: Array, centre: Array, values: Sequence[Array], num_elements: int, thresholds: Sequence[Array]
    ) -> None:
        self.gram, self.centre, self.num_elements = gram, centre, num_elements
        self._values, self._thresholds = values, thresholds
        self.weights = lru_cache(4)(self._calibrated)

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

    def sampled(self, tensor: VirtualTensor) -> Array:
        """Values at the sampled coordinates, (S,) float64."""
        if tensor.values is not None:
            return tensor.values
        total = np.zeros(len(self.centre))
        for index in np.flatnonzero(tensor.coefficients):
            # Subtracted in float32, as for the Gram matrix.
            vector = self.centre if index == 0 else self._values[index - 1] - self.centre
            total += tensor.coefficients[index] * vector.astype(np.float64)
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

    def products(self, tensors: Sequence[VirtualTensor]) -> Array:
        """Inner products of all pairs, (T, T): `c^T G d`, and `sum_k w_k x_k y_k` where either is beyond the span."""
        coefficients = np.stack([tensor.coefficients for tensor in tensors])
        exact: Array = coefficients @ self.gram @ coefficients.T
        beyond = np.array([tensor.values is not None for tensor in tensors])
        if not beyond.any():
            return exact
        values = np.stack([self.sampled(tensor) for tensor in tensors])
        weights = self.weights(tuple(np.flatnonzero((coefficients != 0).any(0)).tolist()))
        return np.where(beyond[:, None] | beyond[None, :], (values * weights) @ values.T, exact)

    def _calibrated(self, used: tuple[int, ...]) -> Array:
        """Weights of the sampled coordinates under which products of some of the span's vectors are exact.

        The nearest to n/S with `sum_k w_k v_ik v_jk = G_ij`; sums of whatever else goes along with such products are
        then nearly exact, too (a calibration estimator: Deville & Saerndal 1992, doi:10.2307/2290268). (S,) float64.
        """
        if self.is_whole:
            return np.ones(len(self.centre))
        vectors = [self.sampled(self.vector(index)) for index in used]
        pairs = [(i, j) for i in range(len(used)) for j in range(i + 1)]
        rows = np.stack([vectors[i] * vectors[j] for i, j in pairs])
        missing = np.array([self.gram[used[i], used[j]] for i, j in pairs]) - self.scale * rows.sum(1)
        norms = np.linalg.norm(rows, axis=1)
        norms = np.where(norms > 0, norms, 1.0)
        rows /= norms[:, None]
        # The least change is a combination of the rows; a product that follows from others adds nothing to it.
        shares = np.linalg.lstsq(rows @ rows.T, missing / norms, rcond=1e-12)[0]
        weights: Array = self.scale + shares @ rows
        return weights

    def threshold(self, index: int, density: float) -> float | None:
        """The exact trim threshold of a checkpoint's task vector, where the signature holds it."""
        known = self._thresholds[index - 1]
        return float(known[DENSITIES.index(density)]) if density in DENSITIES else None

    def fitted(self, values: Array, regressors: Array) -> VirtualTensor:
        """A vector known at the sampled coordinates, its projection on some vectors of the span by least squares.

        Args:
            values: (S,) float64. regressors: (R, K), coefficients of each.
        """
        vectors = np.stack([self.sampled(VirtualTensor(row)) for row in regressors], axis=1)
        norms = np.linalg.norm(vectors, axis=0)
        norms = np.where(norms > 0, norms, 1.0)
        found = np.linalg.lstsq(vectors / norms, values, rcond=1e-12)[0] / norms
        beyond = np.linalg.norm(values - vectors @ found) > _NEGLIGIBLE * np.linalg.norm(values)
        return VirtualTensor(found @ regressors, values if beyond else None)


def tensor_space(samples: Sequence[TensorSample], gram: Array, with_base: bool) -> TensorSpace:
    """From the samples of [base, checkpoints...], or of the checkpoints, in the order of the Gram matrix."""
    values = [sample.values for sample in samples]
    centre = values[0] if with_base else np.stack(values).mean(0, dtype=np.float64).astype(np.float32)
    return TensorSpace(gram, centre, values, samples[0].num_elements, [sample.thresholds for sample in samples])
