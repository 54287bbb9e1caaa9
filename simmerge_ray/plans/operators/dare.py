"""DARE: drop entries of task vectors at random and rescale the rest. Yu et al. 2024, arXiv:2311.03099."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from simmerge_ray.plans.operators.consensus import combine
from simmerge_ray.plans.operators.masks import bernoulli, masked
from simmerge_ray.plans.operators.task_vectors import check_count, per_source, task_vectors


def _dropped(
    operator: str, vectors: Sequence[Tensor], density: float | Sequence[float], rescale: bool, seeds: Sequence[int]
) -> list[Tensor]:
    check_count(operator, "seeds", seeds, len(vectors))
    densities = per_source(operator, "density", density, len(vectors))
    return [
        masked(vector, bernoulli(probability, vector, seed), rescale)
        for vector, probability, seed in zip(vectors, densities, seeds, strict=True)
    ]


def dare_linear(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    seeds: Sequence[int],
    density: float | Sequence[float] = 0.5,
    rescale: bool = True,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """`base + scale * sum_i w_i m_i`, m_i the task vector with each entry kept with probability `density`.

    Args:
        seeds: one for each source; each has its own mask.
        rescale: multiply m_i so that its l1 norm is that of the task vector. The paper divides by the density, which
            is the same in expectation; this one is exact for the tensor at hand, as in mergekit.
        normalize: divide the sum by `sum w_i`.
    """
    base, vectors = task_vectors("dare_linear", base, tensors, weights)
    dropped = _dropped("dare_linear", vectors, density, rescale, seeds)
    return base + scale * combine("dare_linear", dropped, weights, election=False, normalize=normalize)


def dare_ties(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    seeds: Sequence[int],
    density: float | Sequence[float] = 0.5,
    rescale: bool = True,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """`dare_linear` with TIES' election of signs: only entries that agree with the weighted sum's sign are added.

    `normalize` (here divide by the weights that agree) is off, as in mergekit, although it is on in `ties`.
    """
    base, vectors = task_vectors("dare_ties", base, tensors, weights)
    dropped = _dropped("dare_ties", vectors, density, rescale, seeds)
    return base + scale * combine("dare_ties", dropped, weights, election=True, normalize=normalize)
