"""Spherical linear interpolation of two tensors. Shoemake 1985, doi:10.1145/325165.325242."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from simmerge_ray.plans.operators.shares import (
    SLERP_THRESHOLD,
    cosine_of,
    interpolation_weights,
    is_straight,
    right_share,
)
from simmerge_ray.plans.operators.sphere import inner_product
from simmerge_ray.plans.operators.task_vectors import checked_inputs, weighted_sum


def angle_cosine(left: Tensor, right: Tensor) -> float:
    """Cosine of the angle between two tensors seen as vectors, norms guarded at 1e-8, clamped to [-1, 1]."""
    return cosine_of(inner_product(left, left), inner_product(left, right), inner_product(right, right))


def slerp(
    base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], *, threshold: float = SLERP_THRESHOLD
) -> Tensor:
    """`sin((1-t)w)/sin(w) left + sin(tw)/sin(w) right` on the unnormalised tensors, w the angle between them.

    t is the right tensor's share of the two weights. Above `threshold` in |cosine| it is the linear average, as in
    mergekit; close fine-tunes are there in most tensors, so SLERP of whole weights often *is* Linear (`nuslerp` with a
    base is the distinct one). The base is not used.
    """
    _, tensors = checked_inputs("slerp", base, tensors, weights)
    t = right_share("slerp", weights)
    cosine = angle_cosine(*tensors)
    return weighted_sum(tensors, (1.0 - t, t) if is_straight(cosine, threshold) else interpolation_weights(cosine, t))


def slerp_fell_back(base: Tensor | None, tensors: Sequence[Tensor], *, threshold: float = SLERP_THRESHOLD) -> bool:
    """Whether `slerp` of these tensors is their linear average."""
    _, tensors = checked_inputs("slerp", base, tensors, [0.5] * len(tensors))
    return is_straight(angle_cosine(*tensors), threshold)
