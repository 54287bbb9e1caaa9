"""Merges that lie in the span of their sources: shares of left, right and base, and what follows for coefficients.

A (virtual) checkpoint is a coefficient vector c over `[base, task vectors]`, `w = c_0 base + sum_i c_i d_i`; checkpoint
i itself is `e_0 + e_i`. With the Gram matrix G of these vectors `<m, n> = c_m^T G c_n`, exact at any depth.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from simmerge_ray.plans.operators.shares import (
    cosine_of,
    interpolation_weights,
    is_straight,
    kept_count,
    right_share,
)
from simmerge_ray.plans.operators.specs import Arm
from simmerge_ray.plans.plan import step_weights

# <left, left>, <left, right>, <right, right>: of the weights (False) or of the task vectors (True).
Products = Callable[[bool], tuple[float, float, float]]


def blend_shares(arm: Arm, weight: float, products: Products, with_base: bool) -> tuple[float, float, float]:
    """Shares of left, right and base in the merge of two sources, for the operators that have `shares`.

    linear `1 - t, t, 0`; task arithmetic `2 lambda (1 - t), 2 lambda t` and the rest to the base; slerp
    `sin((1 - t) w) / sin w, sin(t w) / sin w, 0`; nuslerp the same with the angle of the task vectors and the rest to
    the base. The angle enters the shares by its square only, so that they are as exact as its cosine. Where the
    operator falls back to the linear average, so does this. nuslerp by slices (`flatten=false`) is taken as one slice.
    """
    params, spec = arm.param_dict(), arm.spec
    if spec.shares == "average":
        return 1.0 - weight, weight, 0.0
    if spec.shares == "sum":
        scale = float(params["scale"]) * (0.5 if params["normalize"] else 1.0)
        left, right = (scale * share for share in step_weights(arm.operator, weight))
        return left, right, 1.0 - left - right
    centred = spec.uses_base and with_base
    cosine = cosine_of(*products(centred))
    share = right_share(arm.operator, step_weights(arm.operator, weight))
    straight = is_straight(cosine, float(params.get("threshold", 1.0)))
    left, right = (1.0 - share, share) if straight else interpolation_weights(cosine, share)
    return left, right, 1.0 - left - right if centred else 0.0


def blend(left: np.ndarray, right: np.ndarray, shares: tuple[float, float, float]) -> np.ndarray:
    """`s_left c_left + s_right c_right + s_base e_0`, all (K,)."""
    merged: np.ndarray = shares[0] * left + shares[1] * right
    merged[0] += shares[2]
    return merged


def kth_largest(vector: np.ndarray, density: float) -> float:
    """Smallest magnitude that trimming to `density` keeps of a vector (S,)."""
    magnitudes = np.abs(vector)
    place = len(magnitudes) - kept_count(density, len(magnitudes))
    return float(np.partition(magnitudes, place)[place])


def trimmed(vector: np.ndarray, threshold: float, density: float, rescale: bool = False) -> np.ndarray:
    """A sampled task vector (S,) with what trimming the whole of it to `density` drops set to zero.

    Entries equal to the threshold, many where weights are stored in few bits, are kept, the first of them first, as far
    as `density` leaves room in the sample. `rescale` restores the l1 norm.
    """
    magnitudes = np.abs(vector)
    kept = magnitudes > threshold
    room = kept_count(density, len(vector)) - int(kept.sum())
    kept[np.flatnonzero(magnitudes == threshold)[: max(0, room)]] = True
    if rescale and (left := float(magnitudes[kept].sum())) > 0:
        vector = vector * (float(magnitudes.sum()) / left)
    return np.where(kept, vector, 0.0)
