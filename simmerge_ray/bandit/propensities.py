"""Exact probabilities with which Thompson sampling plays each arm, by piecewise Gauss-Legendre quadrature.

With independent draws of densities f_k and distributions F_k, `P(k) = int f_k(s) prod_{j != k} F_j(s) ds`. The safe
policy leaves the fixed arm f only for an arm whose draw is the best of the others and exceeds that of f by tau:
`P(k) = int f_k(s) F_f(s - tau) prod_{j != k, f} F_j(s) ds`, and f has the rest.

The line is cut at multiples of every arm's spread around its mean (and, for f, around its mean plus tau), so that each
piece is smooth; beyond the last cut lies less than 1e-15 of any arm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln, ndtr, stdtr

Array = np.ndarray

MIN_SPREAD = 1e-6  # of the largest location, 1 at least: narrower peaks would consist of rounding errors
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)
_GAUSSIAN_CUTS = np.array([-8.5, -5.5, -3.5, -2.0, -1.0, 0.0, 1.0, 2.0, 3.5, 5.5, 8.5])
# Tails of a t distribution fall like a power: cuts grow geometrically, to where less than 1e-15 is left for 3 degrees.
_STEPS = np.concatenate([[0.5, 1.0, 1.5], 2.0 ** np.arange(1, 21)])
_STUDENT_CUTS = np.concatenate([-_STEPS[::-1], [0.0], _STEPS])
_LOG_ROOT = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Draws:
    """Distributions of the arms' draws: location and scale (K,), Gaussian or (degrees given) Student's t.

    degrees: (K,), at least 3, or None.
    """

    location: Array
    scale: Array
    degrees: Array | None = None

    def floored(self) -> Draws:
        """With scales of at least `MIN_SPREAD`."""
        smallest = MIN_SPREAD * max(1.0, float(np.abs(self.location).max()))
        return Draws(self.location, np.maximum(self.scale, smallest), self.degrees)

    @property
    def cuts(self) -> Array:
        return _GAUSSIAN_CUTS if self.degrees is None else _STUDENT_CUTS

    def density(self, points: Array) -> Array:
        """(P,) -> (K, P)."""
        x = (points - self.location[:, None]) / self.scale[:, None]
        if self.degrees is None:
            result: Array = np.exp(-0.5 * x * x - _LOG_ROOT) / self.scale[:, None]
            return result
        n = self.degrees[:, None]
        log_norm = gammaln((n + 1) / 2) - gammaln(n / 2) - 0.5 * np.log(n * math.pi)
        result = np.exp(log_norm - (n + 1) / 2 * np.log1p(x * x / n)) / self.scale[:, None]
        return result

    def distribution(self, points: Array) -> Array:
        """(P,) or (K, P) -> (K, P)."""
        x = (points - self.location[:, None]) / self.scale[:, None]
        result: Array = ndtr(x) if self.degrees is None else stdtr(self.degrees[:, None], x)
        return result


def thompson_propensities(draws: Draws) -> Array:
    """(K,): how often each arm has the largest draw. Sums to 1 within 1e-10, which a test holds.

    Scales below `MIN_SPREAD` count as that, so arms without any spread share what they tie for.
    """
    draws = draws.floored()
    if len(draws.location) == 1:
        return np.ones(1)
    points, weights = _nodes(draws.location[:, None] + draws.scale[:, None] * draws.cuts)
    others = _products_of_others(draws.distribution(points))
    result: Array = (draws.density(points) * others) @ weights
    return result


def safe_propensities(draws: Draws, fixed: int, threshold: float) -> Array:
    """(K,): of the policy that leaves arm `fixed` only for a draw above its own by `threshold`, maybe infinite."""
    num_arms = len(draws.location)
    result = np.zeros(num_arms)
    if num_arms > 1 and not math.isinf(threshold):
        draws = draws.floored()
        shift = np.zeros(num_arms)
        shift[fixed] = threshold
        moved = Draws(draws.location + shift, draws.scale, draws.degrees)
        points, weights = _nodes(moved.location[:, None] + moved.scale[:, None] * moved.cuts)
        # With the fixed arm's draw moved up by tau the rule is to play the largest of all.
        result = (moved.density(points) * _products_of_others(moved.distribution(points))) @ weights
        result[fixed] = 0.0
    result[fixed] = max(0.0, 1.0 - float(result.sum()))
    return result


def with_floor(propensities: Array, floor: float) -> Array:
    """`(1 - K p) pi + p`: every arm is played with probability p at least."""
    result: Array = (1.0 - len(propensities) * floor) * propensities + floor
    return result


def _nodes(cuts: Array) -> tuple[Array, Array]:
    """Quadrature points and weights (P,) of all pieces between the given cuts."""
    edges = np.sort(cuts, axis=None)
    half = 0.5 * np.diff(edges)
    kept = half > 0
    half, middle = half[kept], (0.5 * (edges[1:] + edges[:-1]))[kept]
    return (middle[:, None] + half[:, None] * _NODES).ravel(), (half[:, None] * _WEIGHTS).ravel()


def _products_of_others(values: Array) -> Array:
    """(K, P) -> (K, P): product over the other rows, without a division (a factor may be 0)."""
    before = np.ones_like(values)
    np.cumprod(values[:-1], axis=0, out=before[1:])
    after = np.ones_like(values)
    np.cumprod(values[:0:-1], axis=0, out=after[-2::-1])
    result: Array = before * after
    return result
