"""One checkpoint's tensor unchanged or scaled; with layer ranges it stacks layers of several checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from simmerge_ray.plans.operators.task_vectors import checked_inputs, per_source


def passthrough(
    base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], *, scale: float | Sequence[float] = 1.0
) -> Tensor:
    """`scale * x` of the only source; base and weight are not used."""
    _, (tensor,) = checked_inputs("passthrough", base, tensors, weights)
    (factor,) = per_source("passthrough", "scale", scale, 1)
    return factor * tensor
