"""Inner loops of the merge engine for numba: one pass over a block in the cache. `kernels` calls them.

A block is at most `BLOCK` elements. Inputs are widened to float32, all arithmetic is float32, and the result is rounded
once. Nothing is allocated and nothing raises (see `machine_code`).

numba adds uint32 numbers as uint64, and a loop with 64-bit values is vectorised at half the width or not at all: every
operation on bits is cast back by `U32`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

U32 = np.uint32
_CHUNK = 64
_UPPER = np.uint32(0xFFFF0000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)


@njit(nogil=True)
def _float_of(bits: np.uint32) -> np.float32:
    return np.uint32(bits).view(np.float32)


@njit(nogil=True)
def _bits_of(value: np.float32) -> np.uint32:
    return np.float32(value).view(np.uint32)


@intrinsic
def _fma(typing_context: Any, x: Any, y: Any, z: Any) -> Any:  # float32 x * y + z, rounded once
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), codegen


@njit(nogil=True)
def _wide(bits: np.uint16) -> np.float32:  # bfloat16 bits, also the lower half of a word of two
    return _float_of(U32(U32(bits) << U32(16)))


@njit(nogil=True)
def _rounded(value: np.float32) -> np.uint32:  # bits whose upper half is the bfloat16, ties to even; not for any NaN
    bits = _bits_of(value)
    return U32(U32(bits + U32(0x7FFF)) + U32(U32(bits >> U32(16)) & U32(1)))


@njit(nogil=True)
def _entry(
    values: np.ndarray, base: np.ndarray | None, i: int
) -> np.float32:  # float32, or the difference of bfloat16 bits
    return values[i] if base is None else _wide(values[i]) - _wide(base[i])


@njit(nogil=True)
def _part(values: np.ndarray | None, start: int, size: int) -> np.ndarray | None:
    return None if values is None else values[start : start + size]


@njit(nogil=True)
def widen_bf16(raw: np.ndarray, out: np.ndarray) -> None:
    """bfloat16 bits (uint16) as float32."""
    for i in range(raw.size):
        out[i] = _wide(raw[i])


@njit(nogil=True)
def narrow_bf16(values: np.ndarray, out: np.ndarray) -> bool:
    """float32 rounded to bfloat16 bits, ties to even; returns whether an entry is NaN or infinite."""
    largest = U32(0)
    for i in range(values.size):
        bits = _bits_of(values[i])
        # Rounding could carry a NaN's payload away into infinity.
        is_nan = U32(bits & _MAGNITUDE) > U32(0x7F800000)
        rounded = U32(U32(bits >> U32(16)) | U32(64)) if is_nan else U32(_rounded(values[i]) >> U32(16))
        out[i] = np.uint16(rounded)
        magnitude = U32(rounded & U32(0x7FFF))
        largest = magnitude if magnitude > largest else largest
    return bool(largest >= U32(0x7F80))


@njit(nogil=True)
def any_not_finite(values: np.ndarray, base: np.ndarray | None) -> bool:
    """Whether a float32 block holds NaN or infinity; with a base: `values - base`, both as bfloat16 bits."""
    largest = U32(0)
    for i in range(values.size):
        magnitude = U32(_bits_of(_entry(values, base, i)) & _MAGNITUDE)
        largest = magnitude if magnitude > largest else largest
    return bool(largest >= U32(0x7F800000))


@njit(nogil=True)
def blend_float32(
    left: np.ndarray, right: np.ndarray, left_weight: np.float32, right_weight: np.float32, fused: bool
) -> None:
    """`left <- left_weight left + right_weight right`; `fused` rounds the second product and the sum once.

    The peer's linear is fused (torch), its slerp is not (numpy); where the terms cancel, that is all the difference.
    """
    for i in range(left.size):
        product = left_weight * left[i]
        left[i] = _fma(right_weight, right[i], product) if fused else product + right_weight * right[i]


@njit(nogil=True)
def blend_bf16(
    left: np.ndarray, right: np.ndarray, left_weight: np.float32, right_weight: np.float32, fused: bool, out: np.ndarray
) -> bool:
    """`blend_float32` from bfloat16 bits to bfloat16 bits in one pass; returns whether an entry is NaN or infinite.

    Two entries at a time, as halves of a word: widening and narrowing vectors costs more than the arithmetic.
    """
    even = left.size & -2
    lefts, rights, outs = left[:even].view(U32), right[:even].view(U32), out[:even].view(U32)
    carry = U32(0)
    for i in range(lefts.size):
        first = left_weight * _wide(lefts[i])
        second = left_weight * _float_of(U32(lefts[i] & _UPPER))
        x, y = _wide(rights[i]), _float_of(U32(rights[i] & _UPPER))
        first = _fma(right_weight, x, first) if fused else first + right_weight * x
        second = _fma(right_weight, y, second) if fused else second + right_weight * y
        # A NaN made from bfloat16 inputs has its payload in the upper half: rounding cannot carry it away.
        word = U32(U32(_rounded(first) >> U32(16)) | U32(_rounded(second) & _UPPER))
        outs[i] = word
        carry = U32(carry | U32(U32(word & U32(0x7F807F80)) + U32(0x00800080)))
    if even < left.size:
        last = left_weight * _wide(left[even])
        x = _wide(right[even])
        word = U32(_rounded(_fma(right_weight, x, last) if fused else last + right_weight * x) >> U32(16))
        out[even] = np.uint16(word)
        carry = U32(carry | U32(U32(word & U32(0x7F80)) + U32(0x80)))
    return bool(U32(carry & U32(0x80008000)))


@njit(nogil=True, fastmath={"reassoc", "contract"})
def dots_bf16(left: np.ndarray, right: np.ndarray, sums: np.ndarray) -> None:
    """`dots` from bfloat16 bits."""
    even = left.size & -2
    lefts, rights = left[:even].view(U32), right[:even].view(U32)
    a, b, c = 0.0, 0.0, 0.0
    d, e, f = 0.0, 0.0, 0.0
    for i in range(lefts.size):
        x, y = np.float64(_wide(lefts[i])), np.float64(_wide(rights[i]))
        a += x * x
        b += x * y
        c += y * y
        x, y = np.float64(_float_of(U32(lefts[i] & _UPPER))), np.float64(_float_of(U32(rights[i] & _UPPER)))
        d += x * x
        e += x * y
        f += y * y
    if even < left.size:
        x, y = np.float64(_wide(left[even])), np.float64(_wide(right[even]))
        a += x * x
        b += x * y
        c += y * y
    sums[0] += a + d
    sums[1] += b + e
    sums[2] += c + f


@njit(nogil=True)
def blend_vectors(
    base: np.ndarray, left: np.ndarray, right: np.ndarray, left_weight: np.float32, right_weight: np.float32
) -> None:
    """`left <- base + left_weight (left - base) + right_weight (right - base)`."""
    for i in range(left.size):
        left[i] = base[i] + (left_weight * (left[i] - base[i]) + right_weight * (right[i] - base[i]))


@njit(nogil=True, fastmath={"reassoc", "contract"})
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


@njit(nogil=True)
def subtract(values: np.ndarray, base: np.ndarray) -> None:
    """`values <- values - base`."""
    for i in range(values.size):
        values[i] -= base[i]


@njit(nogil=True)
def count_upper(values: np.ndarray, counts: np.ndarray, base: np.ndarray | None, bins: np.ndarray) -> None:
    """Add magnitudes (of what `any_not_finite` takes) to `counts` (32768,), by the upper 15 bits below the sign.

    The bins are found first, in a loop that is vectorised. bins: room for uint16 of a part of the values.
    """
    for start in range(0, values.size, bins.size):
        chunk, chunk_base = values[start : start + bins.size], _part(base, start, bins.size)
        for i in range(chunk.size):
            bins[i] = np.uint16(U32(_bits_of(_entry(chunk, chunk_base, i)) >> U32(16)) & U32(0x7FFF))
        for i in range(chunk.size):
            counts[bins[i]] += 1


@njit(nogil=True)
def count_lower(values: np.ndarray, high: np.uint32, counts: np.ndarray, base: np.ndarray | None) -> None:
    """Of the magnitudes whose upper bits are `high`, add the lower 16 bits to `counts` (65536 or more,).

    These are few, and between bfloat16 checkpoints most of them have no lower bits: only chunks with others are looked
    at entry by entry, the rest is vectorised.
    """
    num_bare = U32(0)
    for start in range(0, values.size, _CHUNK):
        chunk, chunk_base = values[start : start + _CHUNK], _part(base, start, _CHUNK)
        found = U32(0)
        for i in range(chunk.size):
            bits = U32(_bits_of(_entry(chunk, chunk_base, i)) & _MAGNITUDE)
            same = U32(bits >> U32(16)) == high
            found = U32(found | (U32(bits & U32(0xFFFF)) if same else U32(0)))
            num_bare = U32(num_bare + (U32(1) if bits == U32(high << U32(16)) else U32(0)))
        if found != U32(0):
            for i in range(chunk.size):
                bits = U32(_bits_of(_entry(chunk, chunk_base, i)) & _MAGNITUDE)
                if U32(bits >> U32(16)) == high and U32(bits & U32(0xFFFF)) != U32(0):
                    counts[bits & U32(0xFFFF)] += 1
    counts[0] += num_bare


@njit(nogil=True)
def find_bin(counts: np.ndarray, keep: int, found: np.ndarray) -> None:
    """found (2,) int64: index of the bin that holds the `keep`-th largest, how many are in the bins above it."""
    above = 0
    stop = counts.size
    while stop > 0:
        start = max(0, stop - _CHUNK)
        total = 0
        for i in range(start, stop):
            total += counts[i]
        if above + total >= keep:
            for i in range(stop - 1, start - 1, -1):
                if above + counts[i] >= keep:
                    found[0], found[1] = i, above
                    return
                above += counts[i]
        above += total
        stop = start
    found[0], found[1] = 0, above


@njit(nogil=True)
def trim_block(vector: np.ndarray, threshold: np.uint32, budget: np.ndarray) -> None:
    """Zero what is smaller than the threshold (bits of a magnitude); of what equals it, keep the first budget[0]."""
    num_equal = U32(0)
    smallest = threshold if budget[0] > 0 else U32(threshold + U32(1))
    for i in range(vector.size):  # without branches, so that it is vectorised
        magnitude = U32(_bits_of(vector[i]) & _MAGNITUDE)
        num_equal = U32(num_equal + (U32(1) if magnitude == threshold else U32(0)))
        vector[i] = vector[i] if magnitude >= smallest else np.float32(0.0)
    if budget[0] == 0:
        return
    if num_equal > budget[0]:
        left = budget[0]
        for i in range(vector.size):
            if U32(_bits_of(vector[i]) & _MAGNITUDE) == threshold:
                if left > 0:
                    left -= 1
                else:
                    vector[i] = np.float32(0.0)
        budget[0] = 0
    else:
        budget[0] -= int(num_equal)


@njit(nogil=True)
def _elected(
    base: np.float32, x: np.float32, y: np.float32, election: tuple[np.float32, ...], normalize: bool
) -> np.float32:  # `base + scale * sum_agreeing [/ sum_agreeing(w)]` of two weighted, trimmed entries
    left_weight, right_weight, scale = election
    zero, one = np.float32(0.0), np.float32(1.0)
    sign = one if x + y >= zero else -one
    keep_x, keep_y = x * sign > zero, y * sign > zero
    total = (x if keep_x else zero) + (y if keep_y else zero)
    divisor = (left_weight if keep_x else zero) + (right_weight if keep_y else zero)
    divisor = divisor if normalize and divisor != zero else one
    return base + scale * (total / divisor)


@njit(nogil=True)
def elect_float32(
    base: np.ndarray, left: np.ndarray, right: np.ndarray, election: tuple[np.float32, ...], normalize: bool
) -> None:
    """TIES of two trimmed task vectors: `left <- base + scale * sum_agreeing(w v) [/ sum_agreeing(w)]`."""
    left_weight, right_weight, _ = election
    for i in range(left.size):
        left[i] = _elected(base[i], left_weight * left[i], right_weight * right[i], election, normalize)


@njit(nogil=True)
def _ties_run(
    inputs: tuple[np.ndarray, ...],
    thresholds: np.ndarray,
    budgets: np.ndarray,
    election: tuple[np.float32, ...],
    normalize: bool,
    out: np.ndarray,
) -> tuple[bool, int, int]:  # with all or none of what equals a threshold; (not finite, how many equal it: left, right)
    base, left, right = inputs
    left_weight, right_weight, _ = election
    left_low, right_low = thresholds[0], thresholds[1]
    left_least = left_low if budgets[0] > 0 else U32(left_low + U32(1))
    right_least = right_low if budgets[1] > 0 else U32(right_low + U32(1))
    zero = np.float32(0.0)
    num_left, num_right, carry = U32(0), U32(0), U32(0)
    for i in range(base.size):
        origin = _wide(base[i])
        x, y = _wide(left[i]) - origin, _wide(right[i]) - origin
        size_x, size_y = U32(_bits_of(x) & _MAGNITUDE), U32(_bits_of(y) & _MAGNITUDE)
        num_left = U32(num_left + (U32(1) if size_x == left_low else U32(0)))
        num_right = U32(num_right + (U32(1) if size_y == right_low else U32(0)))
        x = left_weight * (x if size_x >= left_least else zero)
        y = right_weight * (y if size_y >= right_least else zero)
        word = U32(_rounded(_elected(origin, x, y, election, normalize)) >> U32(16))
        out[i] = np.uint16(word)
        carry = U32(carry | U32(U32(word & U32(0x7F80)) + U32(0x80)))
    return bool(U32(carry & U32(0x8000))), int(num_left), int(num_right)


@njit(nogil=True)
def _end_of_budget(base: np.ndarray, values: np.ndarray, threshold: np.uint32, budget: int) -> int:
    """Just behind the entry at which `budget` entries of `values - base` have equalled the threshold in magnitude."""
    for i in range(base.size):
        budget -= int(U32(_bits_of(_entry(values, base, i)) & _MAGNITUDE) == threshold)
        if budget == 0:
            return i + 1
    return base.size


@njit(nogil=True)
def ties_bf16(
    inputs: tuple[np.ndarray, ...],
    thresholds: np.ndarray,
    budgets: np.ndarray,
    election: tuple[np.float32, ...],
    normalize: bool,
    out: np.ndarray,
) -> bool:
    """`trim_block` and `elect_float32` from bfloat16 bits to bfloat16 bits; whether an entry is NaN or infinite.

    inputs: base, left, right. thresholds: (2,) uint32, budgets: (2,) int64, of left and right; the budgets are reduced
    by what was kept. election: weights of left and right, and the scale.
    """
    base, left, right = inputs
    found, start, stop = False, 0, base.size
    while start < base.size:
        part = (base[start:stop], left[start:stop], right[start:stop])
        flag, num_left, num_right = _ties_run(part, thresholds, budgets, election, normalize, out[start:stop])
        end = part[0].size
        if 0 < budgets[0] < num_left:
            end = _end_of_budget(part[0], part[1], thresholds[0], budgets[0])
        if 0 < budgets[1] < num_right:
            end = min(end, _end_of_budget(part[0], part[2], thresholds[1], budgets[1]))
        if end < part[0].size:
            stop = start + end  # again, up to where a budget is spent
            continue
        found |= flag
        budgets[0] = max(0, budgets[0] - num_left)
        budgets[1] = max(0, budgets[1] - num_right)
        start, stop = stop, base.size
    return found
