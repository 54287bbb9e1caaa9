"""DELLA: drop entries at random, small ones more often, and rescale. Deep et al. 2024, arXiv:2406.11617."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simmerge_ray.base.errors import OperatorError
from simmerge_ray.plans.operators.consensus import sparse_sum
from simmerge_ray.plans.operators.masks import bernoulli, masked
from simmerge_ray.plans.operators.task_vectors import check_count, per_source


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
    *,
    seeds: Sequence[int],
    density: float | Sequence[float],
    epsilon: float | Sequence[float],
    rescale: bool,
) -> list[Tensor]:
    """Task vectors with entries kept by `keep_probabilities`, one seed a source; density 1 keeps everything."""
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


della = sparse_sum("della", _pruned, election=True)
della_linear = sparse_sum("della_linear", _pruned, election=False)
