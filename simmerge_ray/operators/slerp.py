"""Spherical linear interpolation of two tensors. Shoemake 1985, doi:10.1145/325165.325242."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simmerge_ray.operators.task_vectors import promote

_MIN_NORM = 1e-8


def angle_cosine(left: Tensor, right: Tensor) -> float:
    """Cosine of the angle between two tensors seen as vectors, norms guarded at 1e-8, clamped to [-1, 1]."""
    flat_left, flat_right = left.reshape(-1), right.reshape(-1)
    norms = [max(float(torch.linalg.vector_norm(v, dtype=torch.float64)), _MIN_NORM) for v in (flat_left, flat_right)]
    # float64: near |cos| = 1 the angle is the square root of what is left, and float32 leaves nothing.
    dot = float(torch.dot(flat_left.double(), flat_right.double()))
    return min(1.0, max(-1.0, dot / (norms[0] * norms[1])))


def interpolation_weights(cosine: float, weight: float) -> tuple[float, float]:
    """`sin((1-t) w)/sin w, sin(t w)/sin w` with w the angle; undefined for |cosine| = 1."""
    angle = math.acos(cosine)
    return math.sin((1.0 - weight) * angle) / math.sin(angle), math.sin(weight * angle) / math.sin(angle)


def slerp(
    base: Tensor | None, left: Tensor, right: Tensor, *, weight: float = 0.5, threshold: float = 0.9995
) -> Tensor:
    """`sin((1-t)w)/sin(w) left + sin(tw)/sin(w) right` on the unnormalised tensors, w the angle between them.

    Above `threshold` in |cosine| it is the linear average, as in mergekit; close fine-tunes are there in most tensors,
    so SLERP of whole weights often *is* Linear (`nuslerp` with a base is the distinct one). The base is not used.
    """
    _, left, right = promote("slerp", None, left, right)
    cosine = angle_cosine(left, right)
    # An exactly (anti)parallel pair has no arc to follow, whatever the threshold.
    if abs(cosine) > threshold or abs(cosine) == 1.0:
        return (1.0 - weight) * left + weight * right
    left_weight, right_weight = interpolation_weights(cosine, weight)
    return left_weight * left + right_weight * right
