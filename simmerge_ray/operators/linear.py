"""Weighted average of two tensors. Wortsman et al. 2022 (model soups), arXiv:2203.05482."""

from __future__ import annotations

from torch import Tensor

from simmerge_ray.operators.task_vectors import promote


def linear(base: Tensor | None, left: Tensor, right: Tensor, *, weight: float = 0.5) -> Tensor:
    """`(1 - weight) left + weight right`; the base is not used. Shapes equal, result float32 (float64 if given)."""
    _, left, right = promote("linear", None, left, right)
    return (1.0 - weight) * left + weight * right
