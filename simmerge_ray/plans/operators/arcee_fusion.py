"""Arcee Fusion: of another checkpoint take the entries that matter most. As mergekit's `arcee_fusion`.

Arcee AI 2024, https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md (no paper).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from simmerge_ray.plans.operators.task_vectors import task_vectors

_GUARD = 1e-8  # added to every probability


def importance(base: Tensor, tensor: Tensor, vector: Tensor) -> Tensor:
    """`|v| KL(softmax(x) || softmax(base))`, the softmax over the last dimension; shape of a tensor."""
    p, q = (torch.softmax(values, dim=-1).add_(_GUARD) for values in (tensor, base))
    return vector.abs() * (p / q).log_().mul_(p).sum(dim=-1, keepdim=True)


def fusion_threshold(scores: Tensor) -> float:
    """Median plus 1.5 times the distance of the quartiles, of all scores; entry `int(q (n - 1))` of the sorted ones.

    Quantiles are exact; mergekit takes those of a random million where a tensor has more.
    """
    places = [quarter * (scores.numel() - 1) // 4 for quarter in (1, 2, 3)]
    low, middle, high = np.partition(scores.reshape(-1).cpu().numpy(), places)[places]
    return float(middle + 1.5 * (high - low))


def arcee_fusion(base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`base + v` where `importance` reaches the `fusion_threshold`, else the base; the weight is not used."""
    base, (vector,) = task_vectors("arcee_fusion", base, tensors, weights)
    if not vector.numel():
        return base + vector
    scores = importance(base, tensors[0].to(base.dtype), vector)
    return base + torch.where(scores >= fusion_threshold(scores), vector, 0.0)
