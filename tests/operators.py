"""An operator on two tensors, as the laws of operators and of the engine call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from simmerge_ray.plans.operators.specs import OPERATOR_SPECS
from simmerge_ray.plans.operators.table import OPERATORS


def two_way(
    name: str,
    base: Tensor | None,
    left: Tensor,
    right: Tensor,
    *,
    weight: float = 0.5,
    seeds: Sequence[int] | None = None,
    **params: Any,
) -> Tensor:
    """The operator on two tensors with weights `2 (1 - weight)` and `2 weight`, so that 0.5 is a weight of 1 for each.

    Task arithmetic at 0.5 is then the usual sum of both task vectors; averages depend on the ratio only.

    Args:
        seeds: of left and right, for random operators; others ignore them.
    """
    if OPERATOR_SPECS[name].random:
        params["seeds"] = seeds
    return OPERATORS[name](base, [left, right], [2.0 * (1.0 - weight), 2.0 * weight], **params)
