"""DELLA: drop entries at random, small ones more often, and rescale. Deep et al. 2024, arXiv:2406.11617."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simmerge_ray.base.errors import OperatorError
from simmerge_ray.plans.operators.consensus import combine
from simmerge_ray.plans.operators.masks import bernoulli, masked
from simmerge_ray.plans.operators.task_vectors import check_count, per_source, task_vectors


def keep_probabilities(vector: Tensor, density: float, epsilon: float) -> Tensor:
    """`density - epsilon + 2 epsilon r / (n - 1)`, r the rank of the magnitude in its row, 0 for the smallest.

    Rows are slices along the last dimension, of n entries (the paper ranks within a node); equal magnitudes rank in
    order. Their mean is `density`, also for a row of one entry. Shape of `vector`, float32.
    """
    rows = vector.reshape(1) if vector.dim() == 0 else vector
    last = rows.shape[-1] - 1
    if last <= 0:
        return torch.full_like(vector, density, dtype=torch.float32)
    order = torch.argsort(rows.abs(), dim=-1, stable=True)
    ladder = (density - epsilon) + 2.0 * epsilon * torch.arange(
        last + 1, dtype=torch.float64, device=rows.device
    ) / last
    probabilities = torch.empty_like(rows, dtype=torch.float32)
    return probabilities.scatter_(-1, order, ladder.float().expand_as(rows))


def _pruned(
    operator: str,
    vectors: Sequence[Tensor],
    density: float | Sequence[float],
    epsilon: float | Sequence[float],
    rescale: bool,
    seeds: Sequence[int],
) -> list[Tensor]:
    count = len(vectors)
    check_count(operator, "seeds", seeds, count)
    densities = per_source(operator, "density", density, count)
    epsilons = per_source(operator, "epsilon", epsilon, count)
    pruned = []
    for vector, middle, spread, seed in zip(vectors, densities, epsilons, seeds, strict=True):
        if middle == 1.0:  # nothing is dropped, so there is nothing to spread
            pruned.append(vector)
            continue
        if middle - spread <= 0.0 or middle + spread >= 1.0:
            raise OperatorError(
                f"operator {operator!r}: keep probabilities from density - epsilon = {middle - spread:g} to "
                f"density + epsilon = {middle + spread:g} are outside (0, 1); choose a smaller epsilon"
            )
        pruned.append(masked(vector, bernoulli(keep_probabilities(vector, middle, spread), vector, seed), rescale))
    return pruned


def della(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    seeds: Sequence[int],
    density: float | Sequence[float] = 0.5,
    epsilon: float | Sequence[float] = 0.15,
    rescale: bool = True,
    scale: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """`della_linear` with TIES' election of signs; `normalize` divides each entry by the weights that agree there."""
    base, vectors = task_vectors("della", base, tensors, weights)
    pruned = _pruned("della", vectors, density, epsilon, rescale, seeds)
    return base + scale * combine("della", pruned, weights, election=True, normalize=normalize)


def della_linear(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    seeds: Sequence[int],
    density: float | Sequence[float] = 0.5,
    epsilon: float | Sequence[float] = 0.15,
    rescale: bool = True,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """`base + scale * sum_i w_i m_i`, m_i the task vector with entries kept by `keep_probabilities`.

    Args:
        seeds: one for each source; each has its own mask.
        density: 1 keeps everything, whatever epsilon is.
        rescale: multiply m_i so that its l1 norm is that of the task vector.
        normalize: divide the sum by `sum w_i`.

    Raises:
        OperatorError: `density - epsilon` or `density + epsilon` is outside (0, 1).
    """
    base, vectors = task_vectors("della_linear", base, tensors, weights)
    pruned = _pruned("della_linear", vectors, density, epsilon, rescale, seeds)
    return base + scale * combine("della_linear", pruned, weights, election=False, normalize=normalize)
