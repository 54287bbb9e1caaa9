"""SLERP of task vectors (or of tensors, without a base), as mergekit's `nuslerp`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simmerge_ray.plans.operators.shares import (
    COLLINEAR_SINE,
    MIN_NORM,
    interpolation_weights,
    is_straight,
    right_share,
)
from simmerge_ray.plans.operators.slerp import angle_cosine
from simmerge_ray.plans.operators.task_vectors import from_base, weighted_sum


def _slice_cosines(left: Tensor, right: Tensor) -> Tensor:
    """Cosine of each pair of last-dimension slices, (..., 1), float64."""
    wide_left, wide_right = left.double(), right.double()
    squares = [(v * v).sum(-1, keepdim=True).clamp(min=MIN_NORM**2) for v in (wide_left, wide_right)]
    dots = (wide_left * wide_right).sum(-1, keepdim=True)
    return (dots / (squares[0] * squares[1]).sqrt()).clamp(-1.0, 1.0)


def _slices_collinear(cosines: Tensor) -> Tensor:
    return ((1.0 - cosines) * (1.0 + cosines)).sqrt() < COLLINEAR_SINE


def _by_slice(left: Tensor, right: Tensor, t: float) -> Tensor:
    """SLERP of each pair of last-dimension slices, linear where collinear; tensors of one dimension at least."""
    cosines = _slice_cosines(left, right)
    collinear = _slices_collinear(cosines)
    angles = torch.acos(torch.where(collinear, 0.0, cosines))
    left_weights = torch.where(collinear, 1.0 - t, torch.sin((1.0 - t) * angles) / torch.sin(angles)).to(left.dtype)
    right_weights = torch.where(collinear, t, torch.sin(t * angles) / torch.sin(angles)).to(right.dtype)
    return left_weights * left + right_weights * right


def _with_slices_last(tensor: Tensor, row_wise: bool) -> Tensor:
    return tensor.transpose(0, -1) if row_wise and tensor.dim() > 1 else tensor


def nuslerp(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    flatten: bool = True,
    row_wise: bool = False,
) -> Tensor:
    """`base + slerp(left - base, right - base)`; without a base `slerp(left, right)`. Linear when collinear.

    Fine-tunes move in nearly orthogonal directions from their base, so on task vectors the two weights are about
    0.71 each where the linear average takes 0.5: this arm differs from Linear where plain SLERP does not.

    Args:
        flatten: one angle for the whole tensor. Otherwise one angle for each slice:
        row_wise: false takes the slices along the last dimension (`x[i, :]` of a matrix), true along the first
            (`x[:, j]`); the name is mergekit's, which has it this way round. A vector is one slice either way.
    """
    base, (left, right) = from_base("nuslerp", base, tensors, weights)
    t = right_share("nuslerp", weights)
    if flatten or left.dim() == 0:
        cosine = angle_cosine(left, right)
        shares = (1.0 - t, t) if is_straight(cosine) else interpolation_weights(cosine, t)
        blended = weighted_sum((left, right), shares)
    else:
        sliced = _by_slice(_with_slices_last(left, row_wise), _with_slices_last(right, row_wise), t)
        blended = _with_slices_last(sliced, row_wise).contiguous()
    return blended if base is None else base + blended


def nuslerp_fell_back(
    base: Tensor | None, tensors: Sequence[Tensor], *, flatten: bool = True, row_wise: bool = False
) -> bool:
    """Whether `nuslerp` of these tensors is their linear average, in every slice."""
    _, (left, right) = from_base("nuslerp", base, tensors, [0.5] * len(tensors))
    if flatten or left.dim() == 0:
        return is_straight(angle_cosine(left, right))
    cosines = _slice_cosines(_with_slices_last(left, row_wise), _with_slices_last(right, row_wise))
    return bool(_slices_collinear(cosines).all())
