"""The loops of the merge engine as machine code: called from any thread, the GIL released. What they do: `loops`."""

from __future__ import annotations

import numpy as np

from simmerge_ray.merging.engine.machine_code import Loop

BLOCK = 1 << 16
PAIR_BLOCK = 1 << 19  # of stored bfloat16, where no float32 copies of a block are needed: larger reads are worth it
_PART = 1024

widen_bf16, narrow_bf16 = Loop("widen_bf16"), Loop("narrow_bf16")
blend_float32, blend_bf16, blend_vectors = Loop("blend_float32"), Loop("blend_bf16"), Loop("blend_vectors")
dots, dots_bf16, subtract = Loop("dots"), Loop("dots_bf16"), Loop("subtract")
trim_block, elect_float32, ties_bf16 = Loop("trim_block"), Loop("elect_float32"), Loop("ties_bf16")
_any_not_finite, _find_bin = Loop("any_not_finite"), Loop("find_bin")
_count_upper, _count_lower = Loop("count_upper"), Loop("count_lower")


def not_finite(values: np.ndarray, base: np.ndarray | None = None) -> bool:
    """Whether a float32 block holds NaN or infinity; with a base: `values - base`, both as bfloat16 bits."""
    return bool(_any_not_finite(values, base))


def count_high(values: np.ndarray, counts: np.ndarray, base: np.ndarray | None = None) -> None:
    """Add magnitudes (of what `not_finite` takes) to `counts` (32768,), by the upper 15 bits below the sign."""
    _count_upper(values, counts, base, np.empty(_PART, dtype=np.uint16))


def count_low(values: np.ndarray, high: np.uint32, counts: np.ndarray, base: np.ndarray | None = None) -> None:
    """Of the magnitudes whose upper bits are `high`, add the lower 16 bits to `counts` (65536 or more,)."""
    _count_lower(values, high, counts, base)


def bin_of(counts: np.ndarray, keep: int) -> tuple[int, int]:
    """(index of the bin that holds the `keep`-th largest, how many are in the bins above it)."""
    found = np.empty(2, dtype=np.int64)
    _find_bin(counts, int(keep), found)
    return int(found[0]), int(found[1])
