"""Both orders of a pair: what a model learns of each, and what the two say together.

A model has one head for each merge operator and one for `keep`, which is about the checkpoint that comes first. So what
a swap of the pair means is built in: merge operators are the mean over both orders (all here are symmetric), and
keep(left) and keep(right) are the keep head on the one order and on the other.

Shapes: N contexts, K arms (keep(left) and keep(right) last), H heads: K, or K - 1 with keep.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simmerge_ray.plans.keeping import KEEP, keeps, merge_arms


def heads_of(arms: Sequence[str]) -> tuple[str, ...]:
    """(H,): what each head of a model of these arms is about."""
    return (*merge_arms(arms), KEEP) if keeps(arms) else tuple(arms)


def by_order(values: np.ndarray, keep: bool) -> np.ndarray:
    """(N, K) of arms -> (N, 2, H) of heads, for both orders of each pair. keep: whether the last two arms are kept
    parents."""
    if not keep:
        return np.repeat(values[:, None], 2, axis=1)
    merges, kept = values[:, None, :-2], values[:, -2:, None]
    return np.concatenate([np.repeat(merges, 2, axis=1), kept], axis=2)


def of_arms(outputs: np.ndarray, keep: bool) -> np.ndarray:
    """(..., 2, H) outputs for both orders -> (..., K) of arms: the inverse of `by_order`, which averages over the
    orders. keep: whether the last head is that of keep."""
    mean = outputs.mean(-2)
    return np.concatenate([mean[..., :-1], outputs[..., -1]], axis=-1) if keep else mean
