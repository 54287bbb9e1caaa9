"""TIES: trim, elect signs, merge what agrees. Yadav et al. 2023, arXiv:2306.01708."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from simmerge_ray.base.errors import OperatorError
from simmerge_ray.plans.operators.consensus import combine
from simmerge_ray.plans.operators.masks import largest, masked
from simmerge_ray.plans.operators.shares import kept_count
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS
from simmerge_ray.plans.operators.task_vectors import check_count, per_source, task_vectors


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
    trim_scope: str = "tensor",
    thresholds: Sequence[float] | None = None,
    budgets: Sequence[int] | None = None,
) -> Tensor:
    """Trim the task vectors, elect per entry the sign of their weighted sum, average the entries that agree.

    `base + scale * sum_agreeing(w_i v_i) / sum_agreeing(w_i)`, without the division unless `normalize`; a zero sum
    elects plus.

    Args:
        trim_scope: `tensor`, or `global` for trimming over the whole model, as in the paper. One tensor cannot know the
            thresholds of that: without `thresholds` it is taken as the whole model.
        thresholds: one for each source; entries with `|task vector| >= threshold` are kept instead of the
            `kept_count` largest.
        budgets: one for each source; of the entries equal to the threshold so many are kept, the first in flat order.

    Raises:
        OperatorError: see `task_vectors`; a parameter out of range; not one threshold or budget for each source.
    """
    if problem := OPERATOR_SPECS["ties"].parameters["trim_scope"].problem(trim_scope):
        raise OperatorError(f"operator 'ties': parameter 'trim_scope': {problem}")
    base, vectors = task_vectors("ties", base, tensors, weights)
    if thresholds is None:
        densities = per_source("ties", "density", density, len(vectors))
        trimmed = [trim(vector, single) for vector, single in zip(vectors, densities, strict=True)]
    else:
        check_count("ties", "thresholds", thresholds, len(vectors))
        masks = [vector.abs() >= low for vector, low in zip(vectors, thresholds, strict=True)]
        if budgets is not None:
            check_count("ties", "budgets", budgets, len(vectors))
            for vector, mask, low, budget in zip(vectors, masks, thresholds, budgets, strict=True):
                equal = vector.abs() == low
                mask &= ~equal | (equal.reshape(-1).cumsum(0).reshape(equal.shape) <= budget)
        trimmed = [masked(vector, mask) for vector, mask in zip(vectors, masks, strict=True)]
    return base + scale * combine("ties", trimmed, weights, election=True, normalize=normalize)
