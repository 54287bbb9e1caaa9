"""TIES: trim, elect signs, merge what agrees. Yadav et al. 2023, arXiv:2306.01708."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from simmerge_ray.base.errors import OperatorError
from simmerge_ray.plans.operators.consensus import sparse_sum
from simmerge_ray.plans.operators.masks import largest, masked
from simmerge_ray.plans.operators.shares import kept_count
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS
from simmerge_ray.plans.operators.task_vectors import check_count, per_source


def trim(vector: Tensor, density: float, rescale: bool = False) -> Tensor:
    """`vector` with all but its `kept_count` largest magnitudes set to zero; the first of equal ones are kept."""
    keep = kept_count(density, vector.numel())
    return vector if keep == vector.numel() else masked(vector, largest(vector.abs(), keep), rescale)


def _trimmed(
    operator: str,
    vectors: Sequence[Tensor],
    *,
    density: float | Sequence[float],
    trim_scope: str,
    rescale: bool,
    thresholds: Sequence[float] | None = None,
    budgets: Sequence[int] | None = None,
) -> list[Tensor]:
    """The trimmed task vectors; `trim_scope: global` trims over the whole model, as in the paper.

    One tensor cannot know the thresholds of that: without `thresholds` it is taken as the whole model.

    Args:
        rescale: restore the l1 norm of each, where anything is left.
        thresholds: one for each source; entries with `|task vector| >= threshold` are kept instead of the
            `kept_count` largest.
        budgets: one for each source; how many entries equal to the threshold are kept, the first in flat order.
    """
    if problem := OPERATOR_SPECS[operator].parameters["trim_scope"].problem(trim_scope):
        raise OperatorError(f"operator {operator!r}: parameter 'trim_scope': {problem}")
    if thresholds is None:
        densities = per_source(operator, "density", density, len(vectors))
        return [trim(vector, single, rescale) for vector, single in zip(vectors, densities, strict=True)]
    check_count(operator, "thresholds", thresholds, len(vectors))
    masks = [vector.abs() >= low for vector, low in zip(vectors, thresholds, strict=True)]
    if budgets is not None:
        check_count(operator, "budgets", budgets, len(vectors))
        for vector, mask, low, budget in zip(vectors, masks, thresholds, budgets, strict=True):
            equal = vector.abs() == low
            mask &= ~equal | (equal.reshape(-1).cumsum(0).reshape(equal.shape) <= budget)
    return [masked(vector, mask, rescale) for vector, mask in zip(vectors, masks, strict=True)]


ties = sparse_sum("ties", _trimmed, election=True)
