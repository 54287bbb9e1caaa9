"""Sum of task vectors. Ilharco et al. 2023, arXiv:2212.04089."""

from __future__ import annotations

from torch import Tensor

from simmerge_ray.operators.task_vectors import task_vectors


def task_arithmetic(
    base: Tensor | None, left: Tensor, right: Tensor, *, weight: float = 0.5, scale: float = 1.0
) -> Tensor:
    """`base + scale * 2 * ((1 - weight) (left - base) + weight (right - base))`, shapes equal.

    The factor 2 makes weight 0.5 the usual sum of both task vectors; `scale = 0.5` is then Linear.
    """
    base, left_vector, right_vector = task_vectors("task_arithmetic", base, left, right)
    return base + scale * 2.0 * ((1.0 - weight) * left_vector + weight * right_vector)
