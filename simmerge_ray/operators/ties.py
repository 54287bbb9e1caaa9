"""TIES: trim, elect signs, merge what agrees. Yadav et al. 2023, arXiv:2306.01708."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from simmerge_ray.operators.consensus import combine
from simmerge_ray.operators.masks import largest, masked
from simmerge_ray.operators.shares import kept_count
from simmerge_ray.operators.task_vectors import check_count, per_source, task_vectors


def trim(vector: Tensor, density: float) -> Tensor:
    """`vector` with all but its `kept_count` largest magnitudes set to zero; the first of equal ones are kept."""
    keep = kept_count(density, vector.numel())
    return vector if keep == vector.numel() else masked(vector, largest(vector.abs(), keep))


def ties(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float | Sequence[float] = 0.5,
    scale: float = 1.0,
    normalize: bool = True,
    thresholds: Sequence[float] | None = None,
) -> Tensor:
    """Trim the task vectors, elect per entry the sign of their weighted sum, average the entries that agree.

    `base + scale * sum_agreeing(w_i v_i) / sum_agreeing(w_i)`, without the division unless `normalize`; a zero sum
    elects plus.

    Args:
        thresholds: one for each source; entries with `|task vector| >= threshold` are kept instead of the
            `kept_count` largest. For trimming over the whole model, whose thresholds one tensor cannot know.
    """
    base, vectors = task_vectors("ties", base, tensors, weights)
    if thresholds is None:
        densities = per_source("ties", "density", density, len(vectors))
        trimmed = [trim(vector, single) for vector, single in zip(vectors, densities, strict=True)]
    else:
        check_count("ties", "thresholds", thresholds, len(vectors))
        trimmed = [masked(vector, vector.abs() >= low) for vector, low in zip(vectors, thresholds, strict=True)]
    return base + scale * combine("ties", trimmed, weights, election=True, normalize=normalize)
