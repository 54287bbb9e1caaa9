"""DARE: drop entries of task vectors at random and rescale the rest. Yu et al. 2024, arXiv:2311.03099."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from simmerge_ray.plans.operators.consensus import sparse_sum
from simmerge_ray.plans.operators.masks import bernoulli, masked
from simmerge_ray.plans.operators.task_vectors import check_count, per_source


def _dropped(
    operator: str, vectors: Sequence[Tensor], *, seeds: Sequence[int], density: float | Sequence[float], rescale: bool
) -> list[Tensor]:
    """Task vectors with each entry kept with probability `density`, by one seed and mask a source.

    The paper rescales by 1 / density, in expectation the same as the l1 norm, which is exact and mergekit's.
    """
    check_count(operator, "seeds", seeds, len(vectors))
    densities = per_source(operator, "density", density, len(vectors))
    return [
        masked(vector, bernoulli(probability, vector, seed), rescale)
        for vector, probability, seed in zip(vectors, densities, seeds, strict=True)
    ]


dare_linear = sparse_sum("dare_linear", _dropped, election=False)
dare_ties = sparse_sum("dare_ties", _dropped, election=True)
