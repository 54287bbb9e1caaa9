"""Model Breadcrumbs: drop the outliers and the small entries of task vectors.

Davari & Belilovsky 2023, arXiv:2312.06795: the mask is made layer by layer; `gamma` is the share of the outliers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from simmerge_ray.plans.operators.consensus import combine
from simmerge_ray.plans.operators.masks import largest, masked
from simmerge_ray.plans.operators.task_vectors import per_source, task_vectors


def kept_band(density: float, gamma: float, num_entries: int) -> tuple[int, int]:
    """(outliers dropped, entries kept) of n: `int(density n)` are kept whatever gamma is.

    Of `int(gamma n)` outliers only so many are dropped as leave that count.
    """
    kept = int(density * num_entries)
    return min(int(gamma * num_entries), num_entries - kept), kept


def band(vector: Tensor, density: float, gamma: float, rescale: bool = False) -> Tensor:
    """`vector` with its largest and smallest magnitudes set to zero; the first of equal ones count as larger.

    Args:
        rescale: multiply by what restores the l1 norm.
    """
    dropped, kept = kept_band(density, gamma, vector.numel())
    magnitudes = vector.abs()
    # Masks of growing counts are nested, so the difference has exactly `kept` entries.
    return masked(vector, largest(magnitudes, dropped + kept) & ~largest(magnitudes, dropped), rescale)


def _bands(
    operator: str,
    vectors: Sequence[Tensor],
    density: float | Sequence[float],
    gamma: float | Sequence[float],
    rescale: bool,
) -> list[Tensor]:
    densities = per_source(operator, "density", density, len(vectors))
    gammas = per_source(operator, "gamma", gamma, len(vectors))
    return [band(*each, rescale) for each in zip(vectors, densities, gammas, strict=True)]


def breadcrumbs(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float | Sequence[float] = 0.5,
    gamma: float | Sequence[float] = 0.01,
    rescale: bool = False,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """`base + scale * sum_i w_i m_i`, m_i the `band` of the task vector; `normalize` divides by `sum w_i`."""
    base, vectors = task_vectors("breadcrumbs", base, tensors, weights)
    bands = _bands("breadcrumbs", vectors, density, gamma, rescale)
    return base + scale * combine("breadcrumbs", bands, weights, election=False, normalize=normalize)


def breadcrumbs_ties(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float | Sequence[float] = 0.5,
    gamma: float | Sequence[float] = 0.01,
    rescale: bool = False,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """`breadcrumbs` with TIES' election of signs; `normalize` (by the weights that agree) is off, as in mergekit."""
    base, vectors = task_vectors("breadcrumbs_ties", base, tensors, weights)
    bands = _bands("breadcrumbs_ties", vectors, density, gamma, rescale)
    return base + scale * combine("breadcrumbs_ties", bands, weights, election=True, normalize=normalize)
