"""Inner loops of the merge engine, compiled by numba: one pass over a block that lies in the cache, GIL released.

A block is at most `BLOCK` elements. Inputs are widened to float32, all arithmetic is float32, and the result is rounded
once. Compiled code is kept on disk by numba, so only the first merge on a machine waits for the compiler.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

BLOCK = 1 << 16
PAIR_BLOCK = 1 << 19  # where no float32 copies of a block are needed, larger ones are worth it


@intrinsic
def _float_of(typing_context: Any, bits: Any) -> Any:  # uint32 -> float32 with the same bits
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def _bits_of(typing_context: Any, value: Any) -> Any:  # float32 -> uint32 with the same bits
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def _fma(typing_context: Any, x: Any, y: Any, z: Any) -> Any:  # float32 x * y + z, rounded once
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), codegen


@njit(cache=True, nogil=True)
def widen_bf16(raw: np.ndarray, out: np.ndarray) -> None:
    """bfloat16 bits (uint16) as float32."""
    for i in range(raw.size):
        out[i] = _float_of(np.uint32(raw[i]) << np.uint32(16))


@njit(cache=True, nogil=True)
def narrow_bf16(values: np.ndarray, out: np.ndarray) -> bool:
    """float32 rounded to bfloat16 bits, ties to even; returns whether an entry is NaN or infinite."""
    largest = np.uint32(0)
    for i in range(values.size):
        bits = _bits_of(values[i])
        magnitude = bits & np.uint32(0x7FFFFFFF)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        # Rounding could carry a NaN's payload away into infinity.
        out[i] = np.uint16((bits >> np.uint32(16)) | np.uint32(64) if magnitude > np.uint32(0x7F800000) else rounded)
        largest = max(largest, np.uint32(out[i]) & np.uint32(0x7FFF))
    return bool(largest >= np.uint32(0x7F80))


@njit(cache=True, nogil=True)
def not_finite(values: np.ndarray) -> bool:
    """Whether a float32 block holds NaN or infinity."""
    largest = np.uint32(0)
    for i in range(values.size):
        largest = max(largest, _bits_of(values[i]) & np.uint32(0x7FFFFFFF))
    return bool(largest >= np.uint32(0x7F800000))


@njit(cache=True, nogil=True)
def blend(left: np.ndarray, right: np.ndarray, left_weight: np.float32, right_weight: np.float32, fused: bool) -> None:
    """`left <- left_weight left + right_weight right`; `fused` rounds the second product and the sum once.

    The peer's linear is fused (torch), its slerp is not (numpy); where the terms cancel, that is all the difference.
    """
    for i in range(left.size):
        product = left_weight * left[i]
        left[i] = _fma(right_weight, right[i], product) if fused else product + right_weight * right[i]


@njit(cache=True, nogil=True)
def blend_bf16(
    left: np.ndarray,
    right: np.ndarray,
    left_weight: np.float32,
    right_weight: np.float32,
    fused: bool,
    out: np.ndarray,
) -> bool:
    """`blend` from bfloat16 bits to bfloat16 bits in one pass; returns whether an entry is NaN or infinite."""
    carry = np.uint32(0)
    for i in range(left.size):
        x = _float_of(np.uint32(left[i]) << np.uint32(16))
        y = _float_of(np.uint32(right[i]) << np.uint32(16))
        product = left_weight * x
        bits = _bits_of(_fma(right_weight, y, product) if fused else product + right_weight * y)
        # A NaN made from bfloat16 inputs has its payload in the upper half: rounding cannot carry it away.
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        out[i] = np.uint16(rounded)
        carry |= (rounded & np.uint32(0x7F80)) + np.uint32(0x80)
    return bool(carry & np.uint32(0x8000))


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def dots_bf16(left: np.ndarray, right: np.ndarray, sums: np.ndarray) -> None:
    """`dots` from bfloat16 bits."""
    a, b, c = 0.0, 0.0, 0.0
    for i in range(left.size):
        x = np.float64(_float_of(np.uint32(left[i]) << np.uint32(16)))
        y = np.float64(_float_of(np.uint32(right[i]) << np.uint32(16)))
        a += x * x
        b += x * y
        c += y * y
    sums[0] += a
    sums[1] += b
    sums[2] += c


@njit(cache=True, nogil=True)
def blend_vectors(
    base: np.ndarray, left: np.ndarray, right: np.ndarray, left_weight: np.float32, right_weight: np.float32
) -> None:
    """`left <- base + left_weight (left - base) + right_weight (right - base)`."""
    for i in range(left.size):
        left[i] = base[i] + (left_weight * (left[i] - base[i]) + right_weight * (right[i] - base[i]))


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def dots(left: np.ndarray, right: np.ndarray, sums: np.ndarray) -> None:
    """Add <left, left>, <left, right>, <right, right> of a block to `sums` (3,) float64.

    Products in float64: near |cos| = 1 the angle is the square root of what is left, and float32 leaves nothing.
    """
    a, b, c = 0.0, 0.0, 0.0
    for i in range(left.size):
        x, y = np.float64(left[i]), np.float64(right[i])
        a += x * x
        b += x * y
        c += y * y
    sums[0] += a
    sums[1] += b
    sums[2] += c


@njit(cache=True, nogil=True)
def subtract(values: np.ndarray, base: np.ndarray) -> None:
    """`values <- values - base`."""
    for i in range(values.size):
        values[i] -= base[i]


@njit(cache=True, nogil=True)
def count_high(vector: np.ndarray, counts: np.ndarray) -> None:
    """Add a block's magnitudes to `counts` (32768,): by the upper 15 bits below the sign, which order them."""
    for i in range(vector.size):
        counts[(_bits_of(vector[i]) >> np.uint32(16)) & np.uint32(0x7FFF)] += 1


@njit(cache=True, nogil=True)
def count_low(vector: np.ndarray, high: np.uint32, counts: np.ndarray) -> None:
    """Of the magnitudes whose upper bits are `high`, add the lower 16 bits to `counts[:65536]`.

    The others are counted in the 64 entries behind: a branch would be mispredicted too often, and one such entry would
    make every step wait for the one before.
    """
    for i in range(vector.size):
        bits = _bits_of(vector[i])
        same = ((bits >> np.uint32(16)) & np.uint32(0x7FFF)) == high
        counts[np.int64(bits & np.uint32(0xFFFF)) if same else 65536 + (i & 63)] += 1


@njit(cache=True, nogil=True)
def bin_of(counts: np.ndarray, keep: int) -> tuple[int, int]:
    """(index of the bin that holds the `keep`-th largest, how many are in the bins above it)."""
    above = 0
    for i in range(counts.size - 1, -1, -1):
        if above + counts[i] >= keep:
            return i, above
        above += counts[i]
    return 0, above


@njit(cache=True, nogil=True)
def trim_block(vector: np.ndarray, threshold: np.uint32, budget: np.ndarray) -> None:
    """Zero what is smaller than the threshold (bits of a magnitude); of what equals it, keep the first budget[0]."""
    num_equal = np.int32(0)
    smallest = threshold if budget[0] > 0 else threshold + np.uint32(1)
    for i in range(vector.size):  # without branches, so that it is vectorised
        magnitude = _bits_of(vector[i]) & np.uint32(0x7FFFFFFF)
        num_equal += np.int32(magnitude == threshold)
        vector[i] = vector[i] if magnitude >= smallest else np.float32(0.0)
    if budget[0] == 0:
        return
    if num_equal > budget[0]:
        left = budget[0]
        for i in range(vector.size):
            if (_bits_of(vector[i]) & np.uint32(0x7FFFFFFF)) == threshold:
                if left > 0:
                    left -= 1
                else:
                    vector[i] = np.float32(0.0)
        budget[0] = 0
    else:
        budget[0] -= num_equal


@njit(cache=True, nogil=True)
def elect(
    base: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    left_weight: np.float32,
    right_weight: np.float32,
    scale: np.float32,
    normalize: bool,
) -> None:
    """TIES of two trimmed task vectors: `left <- base + scale * sum_agreeing(w v) [/ sum_agreeing(w)]`."""
    zero = np.float32(0.0)
    for i in range(left.size):
        x, y = left_weight * left[i], right_weight * right[i]
        positive = (x + y) >= zero
        keep_x = x > zero if positive else x < zero
        keep_y = y > zero if positive else y < zero
        total = (x if keep_x else zero) + (y if keep_y else zero)
        divisor = (left_weight if keep_x else zero) + (right_weight if keep_y else zero)
        if normalize and divisor != zero:
            total = total / divisor
        left[i] = base[i] + scale * total
