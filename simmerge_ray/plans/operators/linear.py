"""Weighted average of tensors. Wortsman et al. 2022 (model soups), arXiv:2203.05482."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simmerge_ray.plans.operators.shares import sum_of_weights
from simmerge_ray.plans.operators.task_vectors import checked_inputs, weighted_sum


def linear(
    base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True
) -> Tensor:
    """`sum_i w_i x_i`, divided by `sum_i w_i` when `normalize` (OperatorError: it is 0); the base is not used."""
    _, tensors = checked_inputs("linear", base, tensors, weights)
    total = weighted_sum(tensors, weights)
    divisor = sum_of_weights("linear", weights, tensors[0].dtype == torch.float64) if normalize else 1.0
    return total if divisor == 1.0 else total / divisor
