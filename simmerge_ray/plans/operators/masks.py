"""Which entries of a task vector are kept: by magnitude or at random, and the rescaling that makes up for the rest."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(values: Tensor, count: int) -> Tensor:
    """True at the `count` largest values; bool, shape of `values`.

    Among entries equal to the smallest kept value the first in flat order are kept, so the result is deterministic and
    the count exact (a partial sort leaves that choice open). The masks of growing counts are nested.
    """
    flat = values.reshape(-1)
    if count <= 0 or count >= flat.numel():
        return torch.full_like(values, count > 0, dtype=torch.bool)
    threshold = torch.kthvalue(flat, flat.numel() - count + 1).values
    mask = flat >= threshold
    if int(mask.sum()) != count:
        mask = flat > threshold
        at_threshold = torch.nonzero(flat == threshold).squeeze(1)
        mask[at_threshold[: count - int(mask.sum())]] = True
    return mask.reshape(values.shape)


def bernoulli(probability: float | Tensor, like: Tensor, seed: int) -> Tensor:
    """True with the given probability, each entry for itself; bool, shape and device of `like`.

    The draw is made on the CPU in float32 whatever `like` is, so that one seed gives one mask on every machine.
    """
    draws = torch.rand(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return draws.to(like.device) < probability


def masked(vector: Tensor, mask: Tensor, rescale: bool = False) -> Tensor:
    """`vector` where `mask`, else 0; with `rescale`, times what restores the l1 norm (if anything is left)."""
    kept = torch.where(mask, vector, 0.0)
    if rescale:
        before, after = (float(v.abs().sum(dtype=torch.float64)) for v in (vector, kept))
        if after > 0:
            kept *= before / after
    return kept
