"""Reinforced agent merging: average what several task vectors change, keep what one changes. arXiv:2601.13572."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simmerge_ray.plans.operators.task_vectors import task_vectors


def _merge(
    operator: str,
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    epsilon: float,
    boost: tuple[float, float] | None = None,
) -> Tensor:
    """`base + sum_i f_i v_i` over the entries that source i changes, `f_i` 1 / (how many change it).

    boost: (r, alpha): where only source i changes an entry, f_i is `1 + r min(alpha, shared_i / own_i)`, with the
        counts of its entries that others change too and that it alone changes.
    """
    base, vectors = task_vectors(operator, base, tensors, weights)
    changed = [vector.abs() > epsilon for vector in vectors]
    count = torch.stack(changed).sum(0)
    total = torch.zeros_like(base)
    for vector, mask in zip(vectors, changed, strict=True):
        own = mask & (count == 1)
        factor = 1.0
        if boost is not None:
            num_own, num_shared = int(own.sum()), int((mask & (count > 1)).sum())
            factor += boost[0] * min(boost[1], num_shared / num_own if num_own else 0.0)
        total += torch.where(own, factor * vector, torch.where(mask, vector / count, 0.0))
    return base + total


def ram(base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], *, epsilon: float = 1e-5) -> Tensor:
    """`base +` for each entry the mean of the task vectors that change it by more than `epsilon`; weights not used."""
    return _merge("ram", base, tensors, weights, epsilon)


def ramplus_tl(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
) -> Tensor:
    """`ram` with what one source alone changes times `1 + r min(alpha, rho)`, rho its shared by its own entries.

    It makes up for what averaging takes from a source; rho is that of the tensor (the paper's tensor-local form).
    """
    return _merge("ramplus_tl", base, tensors, weights, epsilon, (r, alpha))
