"""Model Stock: how far from the base to the average of its fine-tunes. Jang et al. 2024, arXiv:2403.19522."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from simmerge_ray.plans.operators.shares import MIN_NORM
from simmerge_ray.plans.operators.slerp import angle_cosine
from simmerge_ray.plans.operators.task_vectors import task_vectors, weighted_sum

# With N models the formula has a pole at c = -1/(N-1), where the task vectors cancel out.
_MIN_DENOMINATOR = 1e-6


def model_stock(
    base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], *, filter_wise: bool = False
) -> Tensor:
    """`base + t * mean_i(v_i)` with `t = N c / (1 + (N - 1) c)`, c the mean cosine of pairs of the N task vectors.

    That is `t * mean_i(x_i) + (1 - t) * base`. The weights of the sources are not used. Where the denominator is 0,
    the task vectors cancel out and the base stays. `filter_wise`: one c for each slice along the last dimension.
    """
    base, vectors = task_vectors("model_stock", base, tensors, weights)
    count = len(vectors)
    mean = weighted_sum(vectors, [1.0] * count) / count
    pairs = list(itertools.combinations(vectors, 2))
    if not filter_wise or base.dim() < 2:
        cosine = math.fsum(angle_cosine(a, b) for a, b in pairs) / len(pairs)
        denominator = 1.0 + (count - 1) * cosine
        return base + (count * cosine / denominator if abs(denominator) >= _MIN_DENOMINATOR else 0.0) * mean
    norms = [
        torch.linalg.vector_norm(v, dim=-1, keepdim=True, dtype=torch.float64).clamp(min=MIN_NORM) for v in vectors
    ]
    cosines = torch.zeros_like(norms[0])
    for i, j in itertools.combinations(range(count), 2):
        dots = (vectors[i].double() * vectors[j]).sum(-1, keepdim=True)
        cosines += (dots / (norms[i] * norms[j])).clamp(-1.0, 1.0) / len(pairs)
    denominators = 1.0 + (count - 1) * cosines
    regular = denominators.abs() >= _MIN_DENOMINATOR
    return base + torch.where(regular, count * cosines / denominators, 0.0).to(mean.dtype) * mean
