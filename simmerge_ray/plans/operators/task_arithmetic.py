"""Sum of task vectors. Ilharco et al. 2023, arXiv:2212.04089."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from simmerge_ray.plans.operators.consensus import combine
from simmerge_ray.plans.operators.task_vectors import task_vectors


def task_arithmetic(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """`base + scale * sum_i w_i (x_i - base)`, shapes equal; the sum is divided by `sum w_i` when `normalize`.

    The usual weights are 1 for each source; with weights that sum to 1 it is Linear.
    """
    base, vectors = task_vectors("task_arithmetic", base, tensors, weights)
    return base + scale * combine("task_arithmetic", vectors, weights, election=False, normalize=normalize)
