"""Compiled loops against torch, bit by bit."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.merging.engine import kernels
from simmerge_ray.plans.operators.ties import trim

BITS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40)
SPECIAL = [
    0x7F800000,
    0xFF800000,
    0x7FC00000,
    0x7F800001,
    0x7F7FFFFF,
    0x80000000,
    1,
    0x00008000,
    0x3F808000,
    0x3F818000,
]


@given(BITS)
def test_rounding_to_bfloat16_is_torch_s(bits):
    values = np.array([*bits, *SPECIAL], dtype=np.uint32).view(np.float32)
    out = np.empty(values.size, dtype=np.uint16)
    flagged = kernels.narrow_bf16(values, out)
    expected = torch.from_numpy(values.copy()).bfloat16()
    mine = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(torch.isnan(mine), torch.isnan(expected)) and flagged
    finite = ~torch.isnan(expected)
    assert torch.equal(mine[finite], expected[finite])
    wide = np.empty(values.size, dtype=np.float32)
    kernels.widen_bf16(out, wide)
    np.testing.assert_array_equal(wide, mine.float().numpy())


def test_only_what_is_not_finite_is_flagged():
    out = np.empty(3, dtype=np.uint16)
    largest = np.float32(3.3e38)
    for bad in (np.nan, np.inf, -np.inf):
        assert kernels.not_finite(np.array([1, bad, 2], dtype=np.float32))
        assert kernels.narrow_bf16(np.array([1, bad, 2], dtype=np.float32), out)
    assert not kernels.not_finite(np.array([0, largest, -largest], dtype=np.float32))
    assert not kernels.narrow_bf16(np.array([0, largest, -1e-40], dtype=np.float32), out)
    assert kernels.narrow_bf16(np.array([0, 3.4028e38, 0], dtype=np.float32), out)  # rounds up to infinity


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=2, max_size=40), st.floats(0, 1), st.booleans())
def test_the_blend_of_bfloat16_bits_is_the_separate_one(values, weight, fused):
    half = len(values) // 2
    left, right = (torch.tensor(values[i * half : (i + 1) * half]).bfloat16() for i in (0, 1))
    bits = [tensor.view(torch.int16).numpy().view(np.uint16) for tensor in (left, right)]
    weights = (np.float32(1 - weight), np.float32(weight))
    out = np.empty(half, dtype=np.uint16)
    flagged = kernels.blend_bf16(*bits, *weights, fused, out)
    wide = [tensor.float().numpy().copy() for tensor in (left, right)]
    kernels.blend_float32(*wide, *weights, fused)
    expected = np.empty(half, dtype=np.uint16)
    assert kernels.narrow_bf16(wide[0], expected) == flagged
    np.testing.assert_array_equal(out, expected)


def test_the_blend_of_bits_flags_what_is_not_finite():
    one, infinity, nan = (np.array([bits, 0x3F80], dtype=np.uint16) for bits in (0x3F80, 0x7F80, 0x7FFF))
    out = np.empty(2, dtype=np.uint16)
    half = np.float32(0.5)
    assert not kernels.blend_bf16(one, one, half, half, True, out)
    for bad in (infinity, nan):
        assert kernels.blend_bf16(one, bad, half, half, True, out)
    assert np.isnan(np.array([int(out[0]) << 16], dtype=np.uint32).view(np.float32)[0])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 1e-40]), min_size=1, max_size=50),
    st.floats(0.01, 1.0),
    st.integers(1, 50),
)
def test_trimming_in_blocks_is_trimming_at_once(values, density, block):
    vector = np.array(values, dtype=np.float32)
    keep = max(1, int(density * vector.size))
    order = sorted(range(vector.size), key=lambda i: (-abs(vector[i]), i))
    threshold = abs(vector[order[keep - 1]])
    budget = np.array([keep - int((abs(vector) > threshold).sum())], dtype=np.int64)
    for start in range(0, vector.size, block):
        kernels.trim_block(vector[start : start + block], np.float32(threshold).view(np.uint32), budget)
    expected = trim(torch.tensor(values, dtype=torch.float32), density).numpy()
    np.testing.assert_array_equal(vector, expected)


FEW = st.lists(st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.0078125, 3.0]), min_size=1, max_size=200)


def bits_of(values) -> np.ndarray:
    return torch.tensor(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


@given(FEW, st.integers(0, 1000))
def test_counting_by_upper_then_lower_bits_finds_the_exact_threshold(values, keep):
    base = np.resize(np.array([0.0, 1e-3, 3e-3], dtype=np.float32), len(values))
    low_base, wide = bits_of(base.tolist()), np.empty(len(values), dtype=np.float32)
    kernels.widen_bf16(low_base, wide)
    vector = np.array(values, dtype=np.float32) - wide
    keep = min(len(values), 1 + keep)
    for entries, origin in ((vector, None), (bits_of(values), low_base)):
        high, low = np.zeros(1 << 15, dtype=np.int64), np.zeros(1 << 16, dtype=np.int64)
        kernels.count_high(entries, high, origin)
        top, above = kernels.bin_of(high, keep)
        kernels.count_low(entries, np.uint32(top), low, origin)
        bits, above_low = kernels.bin_of(low, keep - above)
        threshold = np.uint32((top << 16) | bits).view(np.float32)
        assert high.sum() == len(values) and low.sum() == high[top]
        assert threshold == np.sort(np.abs(vector))[-keep]
        assert above + above_low == (np.abs(vector) > threshold).sum()


@settings(max_examples=200, deadline=None)
@given(
    FEW,
    st.tuples(st.integers(0, 60), st.integers(0, 60)),
    st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([0.0, 0.5, 1.0])),
    st.floats(0, 1),
    st.booleans(),
)
def test_ties_of_bfloat16_bits_is_the_separate_one(values, budgets, thresholds, weight, normalize):
    size = len(values) // 3 or 1
    base, left, right = (bits_of(np.resize(values[i * size :] or values, size).tolist()) for i in range(3))
    lows = np.array(thresholds, dtype=np.float32).view(np.uint32)
    weights = np.float32(2 * (1 - weight)), np.float32(2 * weight)
    out, left_budgets = np.empty(size, dtype=np.uint16), np.array(budgets, dtype=np.int64)
    flagged = kernels.ties_bf16((base, left, right), lows, left_budgets, (*weights, np.float32(0.7)), normalize, out)
    wide = [np.empty(size, dtype=np.float32) for _ in range(3)]
    expected, separate = np.empty(size, dtype=np.uint16), np.array(budgets, dtype=np.int64)
    for bits, block in zip((base, left, right), wide, strict=True):
        kernels.widen_bf16(bits, block)
    for number in (0, 1):
        kernels.subtract(wide[number + 1], wide[0])
        kernels.trim_block(wide[number + 1], lows[number], separate[number : number + 1])
    kernels.elect_float32(*wide, (*weights, np.float32(0.7)), normalize)
    assert kernels.narrow_bf16(wide[1], expected) == flagged
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(left_budgets, separate)


@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=2, max_size=41))
def test_dots_of_bfloat16_bits_are_those_of_their_values(values):
    half = len(values) // 2
    left, right = (bits_of(values[i * half : (i + 1) * half]) for i in (0, 1))
    wide = [np.empty(half, dtype=np.float32) for _ in range(2)]
    for bits, block in zip((left, right), wide, strict=True):
        kernels.widen_bf16(bits, block)
    sums = np.zeros(3)
    kernels.dots_bf16(left, right, sums)
    exact = [block.astype(np.float64) for block in wide]
    scale = np.sqrt((exact[0] @ exact[0]) * (exact[1] @ exact[1]))
    np.testing.assert_allclose(sums[[0, 2]], [exact[0] @ exact[0], exact[1] @ exact[1]], rtol=1e-14)
    assert abs(sums[1] - exact[0] @ exact[1]) <= 1e-14 * scale


def test_a_difference_that_is_not_finite_is_seen():
    zero, huge, bad = bits_of([0.0] * 70), bits_of([3e38] * 70), bits_of([1.0] * 69 + [float("inf")])
    assert kernels.not_finite(bad, zero) and kernels.not_finite(huge, bits_of([-3e38] * 70))
    assert not kernels.not_finite(huge, zero)


def test_a_fused_blend_rounds_once():
    weights = np.float32(0.6), np.float32(0.4)
    left, right = np.float32(0.3), np.float32(-0.45)
    separate = np.float32(weights[0] * left) + np.float32(weights[1] * right)
    exact = np.float64(np.float32(weights[0] * left)) + np.float64(weights[1]) * np.float64(right)
    for fused, expected in ((True, np.float32(exact)), (False, separate)):
        value = np.array([left])
        kernels.blend_float32(value, np.array([right]), *weights, fused)
        assert value[0] == expected
    assert np.float32(exact) != separate
