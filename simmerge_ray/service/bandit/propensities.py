"""Exact probabilities with which Thompson sampling plays each arm, by piecewise Gauss-Legendre quadrature.

With independent draws of densities f_k and distributions F_k, `P(k) = int f_k(s) prod_{j != k} F_j(s) ds`. The safe
policy leaves the fixed arm f only for an arm whose draw is the best of the others and exceeds that of f by tau:
`P(k) = int f_k(s) F_f(s - tau) prod_{j != k, f} F_j(s) ds`, and f has the rest.

The line is cut into pieces that are short beside every arm's spread (and, for f, moved by tau), so that each is smooth;
beyond the first and the last cut lies less than 1e-15 of any arm. Two and three arms have closed forms: a normal
distribution and, for `P(k) = P(X_k > X_i and X_k > X_j)`, a bivariate one by Owen's T (Owen 1956, "Tables for computing
bivariate normal probabilities").
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, owens_t

MIN_SPREAD = 1e-6  # of the largest location, 1 at least: narrower peaks would consist of rounding errors
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)
_CUTS = np.array([-8.5, -5.5, -3.5, -2.0, -1.0, 0.0, 1.0, 2.0, 3.5, 5.5, 8.5])
_STEPS = np.array([2.0, 1.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.5, 2.0, 3.0])  # behind each cut, the next one's at most
_LOG_ROOT = 0.5 * math.log(2 * math.pi)
_LEAST = 1e-290  # what a number may still be divided by


@dataclass(frozen=True)
class Draws:
    """Gaussian distributions of the arms' draws: location and scale (K,)."""

    location: np.ndarray
    scale: np.ndarray

    def floored(self) -> Draws:
        """With scales of at least `MIN_SPREAD`."""
        smallest = MIN_SPREAD * max(1.0, float(np.abs(self.location).max()))
        return Draws(self.location, np.maximum(self.scale, smallest))

    def density_and_distribution(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(P,) -> (K, P) each. Row by row: for more than 500 numbers numpy lets go of the interpreter, and a service
        whose other thread is busy waits 5 ms to get it back."""
        density, distribution = np.empty((2, len(self.location), len(points)))
        for row, (location, scale) in enumerate(zip(self.location.tolist(), self.scale.tolist(), strict=True)):
            x = (points - location) / scale
            ndtr(x, out=distribution[row])
            density[row] = np.exp(-0.5 * x * x - _LOG_ROOT) / scale
        return density, distribution


def thompson_propensities(draws: Draws) -> np.ndarray:
    """(K,): how often each arm has the largest draw. Sums to 1 within 1e-10, which a test holds.

    Scales below `MIN_SPREAD` count as that, so arms without any spread share what they tie for.
    """
    return _largest(draws.floored())


def safe_propensities(draws: Draws, fixed: int, threshold: float) -> np.ndarray:
    """(K,): of the policy that leaves arm `fixed` only for a draw above its own by `threshold`, maybe infinite."""
    num_arms = len(draws.location)
    result = np.zeros(num_arms)
    if num_arms > 1 and not math.isinf(threshold):
        location = draws.location.copy()
        location[fixed] += threshold
        # With the fixed arm's draw moved up by tau the rule is to play the largest of all.
        result = _largest(Draws(location, draws.scale).floored())
        result[fixed] = 0.0
    result[fixed] = max(0.0, 1.0 - result.sum())
    return result


def with_floor(propensities: np.ndarray, floor: float) -> np.ndarray:
    """`(1 - K p) pi + p`: every arm is played with probability p at least."""
    return (1.0 - len(propensities) * floor) * propensities + floor


def _largest(draws: Draws) -> np.ndarray:
    """(K,): how often each arm has the largest draw; no scale is 0."""
    num_arms = len(draws.location)
    if num_arms == 1:
        return np.ones(1)
    if num_arms <= 3:
        location, variance = draws.location.tolist(), np.square(draws.scale).tolist()
        closed = _largest_of_two(location, variance) if num_arms == 2 else _largest_of_three(location, variance)
        if closed is not None:
            return closed
    return _by_quadrature(draws)


def _largest_of_two(location: list[float], variance: list[float]) -> np.ndarray:
    difference = (location[0] - location[1]) / math.sqrt(variance[0] + variance[1])
    return ndtr(np.array([difference, -difference]))


def _largest_of_three(m: list[float], v: list[float]) -> np.ndarray | None:
    """By Owen's T; None where two locations are equal, or so nearly that their slope is none, which has other formulas.

    With `h_i = (m_k - m_i) / sqrt(v_k + v_i)` and `rho = v_k / sqrt((v_k + v_i) (v_k + v_j))`:
    `P(k) = (Phi(h_i) + Phi(h_j)) / 2 - T(h_i, a_i) - T(h_j, a_j) - (0 if h_i h_j > 0 else 1 / 2)`, where
    `a_i = (h_j - rho h_i) / (h_i sqrt(1 - rho^2))`, here without a difference of nearly equal numbers.
    """
    root = math.sqrt(v[0] * v[1] + v[0] * v[2] + v[1] * v[2])
    if min(abs(m[0] - m[1]), abs(m[0] - m[2]), abs(m[1] - m[2])) * root < _LEAST:
        return None
    bounds, slopes, jumps = [], [], []
    for k, i, j in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        to_i, to_j = m[k] - m[i], m[k] - m[j]
        bounds += [to_i / math.sqrt(v[k] + v[i]), to_j / math.sqrt(v[k] + v[j])]
        slopes += [
            (v[k] * (m[i] - m[j]) + v[i] * to_j) / (to_i * root),
            (v[k] * (m[j] - m[i]) + v[j] * to_i) / (to_j * root),
        ]
        jumps.append(0.0 if (to_i > 0) == (to_j > 0) else 0.5)
    h = np.array(bounds)
    terms = 0.5 * ndtr(h) - owens_t(h, np.array(slopes))
    return np.maximum(terms[::2] + terms[1::2] - jumps, 0.0)


def _by_quadrature(draws: Draws) -> np.ndarray:
    points, weights = _nodes(_edges(draws))
    density, distribution = draws.density_and_distribution(points)
    others = _products_of_others(distribution)
    return np.array([one @ (rest * weights) for one, rest in zip(density, others, strict=True)])


def _edges(draws: Draws) -> np.ndarray:
    """(P + 1,) rising: where the line is cut. From left to right, each piece is as long as all arms allow it, `_STEPS`
    of their spreads; before its first cut and behind its last one an arm allows any length."""
    of_arms = (draws.location[:, None] + draws.scale[:, None] * _CUTS).tolist()
    steps = (draws.scale[:, None] * _STEPS).tolist()
    at, last = min(cuts[0] for cuts in of_arms), max(cuts[-1] for cuts in of_arms)
    edges = [at]
    while at < last:
        end = last
        for cuts, lengths in zip(of_arms, steps, strict=True):
            place = bisect_right(cuts, at)
            allowed = cuts[0] if place == 0 else at + lengths[place - 1] if place <= len(lengths) else last
            if allowed < end:
                end = allowed
        edges.append(end)
        at = end
    return np.array(edges)


def _nodes(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quadrature points and weights (P,) of all pieces between the given edges."""
    half, middle = 0.5 * np.diff(edges), 0.5 * (edges[1:] + edges[:-1])
    return (middle[:, None] + half[:, None] * _NODES).ravel(), (half[:, None] * _WEIGHTS).ravel()


def _products_of_others(values: np.ndarray) -> np.ndarray:
    """(K, P) -> (K, P): product over the other rows, without a division (a factor may be 0)."""
    found = np.ones_like(values)
    before, after = found[0].copy(), found[0].copy()
    for row in range(len(values)):
        found[row] *= before
        before *= values[row]
    for row in range(len(values) - 1, -1, -1):
        found[row] *= after
        after *= values[row]
    return found
