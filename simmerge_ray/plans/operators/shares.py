"""The plain numbers that operators and the merge engine agree on: shares of weights, angles, counts. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from simmerge_ray.base.errors import OperatorError

MIN_NORM = 1e-8
SLERP_THRESHOLD = 0.9995
# Rounding of a float64 cosine near 1 looks like a sine of 1e-8 to 1e-7. Below this a parallel pair's arc is its chord,
# to 12 digits, and an antiparallel pair's arc has no direction but that of the rounding errors.
COLLINEAR_SINE = 1e-6


def cancel(weights: Sequence[float]) -> bool:
    """Whether weights sum to 0, up to the rounding of numbers like 0.1 + 0.2 - 0.3."""
    return abs(sum(weights)) <= 1e-9 * sum(abs(weight) for weight in weights)


def normalized(operator: str, weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum (OperatorError: it is 0), in float64, so that a sum of 1 leaves them unchanged."""
    if cancel(weights):
        raise OperatorError(f"operator {operator!r}: the weights {tuple(weights)} sum to 0")
    total = sum(weights)
    return [weight / total for weight in weights]


def sum_of_weights(operator: str, weights: Sequence[float], double: bool = False) -> float:
    """What a weighted sum is divided by: the sum in float32 (or float64), as the sum itself is computed.

    So the result has the bits of the plain formula, and shares like 0.3 and 0.7 are not divided at all. Raises as
    `normalized`.
    """
    if cancel(weights):
        raise OperatorError(f"operator {operator!r}: the weights {tuple(weights)} sum to 0")
    return float(np.asarray(weights, dtype=np.float64 if double else np.float32).sum())


def right_share(operator: str, weights: Sequence[float]) -> float:
    """Where on the arc two weights stand: `t = w_right / (w_left + w_right)`."""
    return normalized(operator, weights)[1]


def cosine_of(left_square: float, dot: float, right_square: float) -> float:
    """Cosine from <l, l>, <l, r>, <r, r>, norms guarded at 1e-8, clamped to [-1, 1]."""
    squares = max(left_square, MIN_NORM**2) * max(right_square, MIN_NORM**2)
    # One square root of the product: it is exact for equal tensors, whose cosine is then exactly 1.
    return min(1.0, max(-1.0, dot / math.sqrt(squares)))


def is_straight(cosine: float, threshold: float = 1.0) -> bool:
    """Whether SLERP is the linear average; an (anti)parallel pair has no arc, whatever the threshold."""
    return abs(cosine) > threshold or math.sqrt((1.0 - cosine) * (1.0 + cosine)) < COLLINEAR_SINE


def interpolation_weights(cosine: float, weight: float) -> tuple[float, float]:
    """`sin((1-t) w)/sin w, sin(t w)/sin w` with w the angle; undefined for |cosine| = 1."""
    angle = math.acos(cosine)
    return math.sin((1.0 - weight) * angle) / math.sin(angle), math.sin(weight * angle) / math.sin(angle)


def kept_count(density: float, num_entries: int) -> int:
    """How many entries trimming keeps: `max(1, int(density * n))`, and none of an empty tensor."""
    return min(num_entries, max(1, int(density * num_entries)))
