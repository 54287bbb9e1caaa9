"""Model Breadcrumbs: drop the outliers and the small entries of task vectors.

Davari & Belilovsky 2023, arXiv:2312.06795: the mask is made layer by layer; `gamma` is the share of the outliers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from simmerge_ray.plans.operators.consensus import sparse_sum
from simmerge_ray.plans.operators.masks import largest, masked
from simmerge_ray.plans.operators.task_vectors import per_source


def kept_band(density: float, gamma: float, num_entries: int) -> tuple[int, int]:
    """(outliers dropped, entries kept) of n: `int(density n)` are kept whatever gamma is.

    At most `int(gamma n)` outliers are dropped, fewer where that count would not be left.
    """
    kept = int(density * num_entries)
    return min(int(gamma * num_entries), num_entries - kept), kept


def band(vector: Tensor, density: float, gamma: float, rescale: bool = False) -> Tensor:
    """`vector` with its largest and smallest magnitudes set to zero; the first of equal ones count as larger."""
    dropped, kept = kept_band(density, gamma, vector.numel())
    magnitudes = vector.abs()
    # Masks of growing counts are nested, so the difference has exactly `kept` entries.
    return masked(vector, largest(magnitudes, dropped + kept) & ~largest(magnitudes, dropped), rescale)


def _bands(
    operator: str,
    vectors: Sequence[Tensor],
    *,
    density: float | Sequence[float],
    gamma: float | Sequence[float],
    rescale: bool,
) -> list[Tensor]:
    densities = per_source(operator, "density", density, len(vectors))
    gammas = per_source(operator, "gamma", gamma, len(vectors))
    return [band(*each, rescale) for each in zip(vectors, densities, gammas, strict=True)]


breadcrumbs = sparse_sum("breadcrumbs", _bands, election=False)
breadcrumbs_ties = sparse_sum("breadcrumbs_ties", _bands, election=True)
