"""NearSwap: a checkpoint moves towards another, its entries by at most `t`. As mergekit's `nearswap`.

By alchemonaut, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from simmerge_ray.plans.operators.task_vectors import task_vectors

MIN_DISTANCE = 1e-6  # below it a distance counts as this


def nearswap(base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], *, t: float = 1e-4) -> Tensor:
    """`(1 - s) base + s x` with `s = min(1, t / |x - base|)` for each entry: what is nearer than t becomes x's.

    The weight of the source is not used. `t = 0` leaves the base.
    """
    base, (vector,) = task_vectors("nearswap", base, tensors, weights)
    share = (t / vector.abs().clamp(min=MIN_DISTANCE)).clamp(max=1.0)
    return share * tensors[0].to(base.dtype) + (1.0 - share) * base
