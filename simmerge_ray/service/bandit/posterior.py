"""Bayesian linear regression by sufficient statistics: one posterior for each arm.

With a prior `N(mu0, (ridge I)^-1)` on the weights w and rewards `r = z^T w + noise`:

    A = ridge I + sum_i z_i z_i^T        b = ridge mu0 + sum_i z_i r_i        mean = A^-1 b

`A` and `b` are all that is stored, so a posterior is the fold of its observations and nothing else; means and spreads
come from one Cholesky factor of A. Everything is float64, and an update is one addition in a fixed order: the same
observations in the same order give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg.lapack import dpotrf, dtrtri

from simmerge_ray.base.errors import BanditError

COUNTS = ("count", "sum_squares", "weight")  # what a posterior has beside its arrays


@dataclass(frozen=True, eq=False)
class GaussianPosterior:
    """precision A (d, d), moment b (d,), number and sum of squares of the rewards, those of the prior not counted.

    weight: of the observations, in observations; it differs from `count` after a discount.
    """

    precision: np.ndarray
    moment: np.ndarray
    count: int = 0
    sum_squares: float = 0.0
    weight: float = 0.0

    @staticmethod
    def prior(num_dimensions: int, ridge: float = 1.0, mean: np.ndarray | None = None) -> GaussianPosterior:
        """A prior that has seen nothing, of precision `ridge` and mean (d,), None is 0.
        Raises BanditError: ridge <= 0, or a mean of another shape.
        """
        if not (ridge > 0 and math.isfinite(ridge)):
            raise BanditError(f"ridge is {ridge}; it must be a finite number above 0")
        centre = np.zeros(num_dimensions) if mean is None else _vector(mean, num_dimensions, "the prior's mean")
        return GaussianPosterior(ridge * np.eye(num_dimensions), ridge * centre)

    @property
    def num_dimensions(self) -> int:
        return len(self.moment)

    def updated(self, z: np.ndarray, reward: float) -> GaussianPosterior:
        """With one more observation: z (d,), and its reward. Raises BanditError: z of another shape, or not finite."""
        z = _vector(z, self.num_dimensions, "z")
        if not math.isfinite(reward):
            raise BanditError(f"a reward is {reward}; it must be a finite number")
        return GaussianPosterior(
            self.precision + np.outer(z, z),
            self.moment + z * reward,
            self.count + 1,
            self.sum_squares + reward * reward,
            self.weight + 1.0,
        )

    def fold(self, observations: Iterable[tuple[np.ndarray, float]]) -> GaussianPosterior:
        """`updated` for one (z, reward) after the other."""
        posterior = self
        for z, reward in observations:
            posterior = posterior.updated(z, reward)
        return posterior

    def discounted(self, factor: float, prior: GaussianPosterior) -> GaussianPosterior:
        """What was observed counts `factor` of what it did; the prior counts whole, so nothing is forgotten below it.
        Raises BanditError: a factor outside (0, 1], or a prior of other dimensions.
        """
        if not 0 < factor <= 1:
            raise BanditError(f"the discount factor is {factor}; it must be above 0 and at most 1")
        if prior.num_dimensions != self.num_dimensions:
            raise BanditError(f"the prior has {prior.num_dimensions} dimensions, the posterior {self.num_dimensions}")
        return GaussianPosterior(
            prior.precision + factor * (self.precision - prior.precision),
            prior.moment + factor * (self.moment - prior.moment),
            self.count,
            factor * self.sum_squares,
            factor * self.weight,
        )

    @property
    def mean(self) -> np.ndarray:
        """(d,): of the weights."""
        return self._projection[-1]

    @cached_property
    def _projection(self) -> np.ndarray:
        """(d + 1, d): `L^-1`, with `A = L L^T`, and the mean below it: one product has all that a decision needs."""
        factor, status = dpotrf(self.precision, lower=1)
        if status != 0:
            raise BanditError("the precision of a posterior is not positive definite")
        inverse, status = dtrtri(factor, lower=1)
        assert status == 0
        projection = np.empty((self.num_dimensions + 1, self.num_dimensions))
        projection[:-1] = inverse
        projection[-1] = projection[:-1].T @ (projection[:-1] @ self.moment)
        return projection

    def marginal(self, z: np.ndarray) -> tuple[float, float]:
        """`z^T mean` and `|L^-1 z|`: the predicted reward, and its spread for noise of spread 1."""
        projected = self._projection @ z
        spread = projected[:-1]
        return projected.item(-1), math.sqrt(spread @ spread)


class RunningPosterior:
    """Prior and sums of one arm, updated in place. `posterior` has the bits of `GaussianPosterior.updated`."""

    __slots__ = ("prior", "_precision", "_moment", "_count", "_sum_squares", "_weight", "_posterior", "_product")

    def __init__(self, prior: GaussianPosterior, posterior: GaussianPosterior) -> None:
        self.prior = prior
        self._product = np.empty(prior.precision.shape)
        self._set(posterior)

    def _set(self, posterior: GaussianPosterior) -> None:
        self._precision, self._moment = posterior.precision.copy(), posterior.moment.copy()
        self._count, self._sum_squares, self._weight = posterior.count, posterior.sum_squares, posterior.weight
        self._posterior: GaussianPosterior | None = posterior

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a context."""
        return self._moment.shape

    @property
    def posterior(self) -> GaussianPosterior:
        """The same object until something is learned, so that its factor is computed once."""
        if self._posterior is None:
            self._posterior = GaussianPosterior(
                self._precision.copy(), self._moment.copy(), self._count, self._sum_squares, self._weight
            )
        return self._posterior

    def add(self, z: np.ndarray, reward: float) -> None:
        """One observation, in place: a new matrix for each would make a long fold twice as slow."""
        np.dot(z[:, None], z[None, :], out=self._product)  # one product an entry, rounded once: the bits of np.outer
        self._precision += self._product
        self._moment += z * reward
        self._count += 1
        self._sum_squares += reward * reward
        self._weight += 1.0
        self._posterior = None

    def discount(self, factor: float) -> None:
        """As `GaussianPosterior.discounted`."""
        self._set(self.posterior.discounted(factor, self.prior))


def _vector(values: np.ndarray, num_dimensions: int, what: str) -> np.ndarray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.shape != (num_dimensions,):
        raise BanditError(f"{what} has the shape {vector.shape}; it must be ({num_dimensions},)")
    if not np.isfinite(vector).all():
        raise BanditError(f"{what} has an entry that is not a finite number")
    return vector
