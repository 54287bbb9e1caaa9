"""SLERP of task vectors (or of tensors, without a base), as mergekit's `nuslerp` with `flatten: true`."""

from __future__ import annotations

import math

from torch import Tensor

from simmerge_ray.operators.slerp import angle_cosine, interpolation_weights
from simmerge_ray.operators.task_vectors import promote

_COLLINEAR_SINE = 1e-8


def nuslerp(base: Tensor | None, left: Tensor, right: Tensor, *, weight: float = 0.5) -> Tensor:
    """`base + slerp(left - base, right - base)`; without a base `slerp(left, right)`. Linear when collinear.

    Fine-tunes move in nearly orthogonal directions from their base, so on task vectors the two weights are about
    0.71 each where the linear average takes 0.5: this arm differs from Linear where plain SLERP does not.
    """
    base, left, right = promote("nuslerp", base, left, right)
    if base is not None:
        left, right = left - base, right - base
    cosine = angle_cosine(left, right)
    if math.sqrt(max(0.0, 1.0 - cosine * cosine)) < _COLLINEAR_SINE:
        blended = (1.0 - weight) * left + weight * right
    else:
        left_weight, right_weight = interpolation_weights(cosine, weight)
        blended = left_weight * left + right_weight * right
    return blended if base is None else base + blended
