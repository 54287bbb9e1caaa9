"""TIES: trim, elect signs, merge what agrees. Yadav et al. 2023, arXiv:2306.01708."""

from __future__ import annotations

import torch
from torch import Tensor

from simmerge_ray.operators.task_vectors import task_vectors


def kept_count(density: float, num_entries: int) -> int:
    """How many entries trimming keeps: `max(1, int(density * n))`, and none of an empty tensor."""
    return min(num_entries, max(1, int(density * num_entries)))


def trim(vector: Tensor, density: float) -> Tensor:
    """`vector` with all but its `kept_count` largest magnitudes set to zero.

    Among entries equal to the threshold the first in flat order are kept, so the result is deterministic and the
    count exact (a partial sort leaves that choice open).
    """
    flat = vector.reshape(-1)
    keep = kept_count(density, flat.numel())
    if keep == flat.numel():
        return vector
    magnitudes = flat.abs()
    threshold = torch.kthvalue(magnitudes, flat.numel() - keep + 1).values
    mask = magnitudes > threshold
    at_threshold = magnitudes == threshold
    mask |= at_threshold & (torch.cumsum(at_threshold, 0) <= keep - int(mask.sum()))
    return torch.where(mask, flat, flat.new_zeros(())).reshape(vector.shape)


def ties(
    base: Tensor | None,
    left: Tensor,
    right: Tensor,
    *,
    weight: float = 0.5,
    density: float = 0.5,
    scale: float = 1.0,
) -> Tensor:
    """Trim both task vectors, elect per entry the sign of their weighted sum, average the entries that agree.

    `base + scale * sum_agreeing(w_i v_i) / sum_agreeing(w_i)` with w = (1 - weight, weight); a zero sum elects plus.
    """
    base, left_vector, right_vector = task_vectors("ties", base, left, right)
    vectors = torch.stack((trim(left_vector, density), trim(right_vector, density)))  # (2, *shape)
    weights = vectors.new_tensor((1.0 - weight, weight)).reshape(2, *([1] * left_vector.dim()))
    weighted = weights * vectors
    elected = torch.where(weighted.sum(0) >= 0, 1.0, -1.0).to(vectors.dtype)
    agrees = weighted.sign() == elected
    total = torch.where(agrees, weighted, 0.0).sum(0)
    divisor = torch.where(agrees, weights.expand_as(vectors), 0.0).sum(0)
    return base + scale * total / torch.where(divisor > 0, divisor, 1.0)
