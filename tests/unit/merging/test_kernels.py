"""Compiled loops against torch, bit by bit."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.merging import kernels
from simmerge_ray.operators.ties import trim

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
    kernels.blend(*wide, *weights, fused)
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


def test_a_fused_blend_rounds_once():
    weights = np.float32(0.6), np.float32(0.4)
    left, right = np.float32(0.3), np.float32(-0.45)
    separate = np.float32(weights[0] * left) + np.float32(weights[1] * right)
    exact = np.float64(np.float32(weights[0] * left)) + np.float64(weights[1]) * np.float64(right)
    for fused, expected in ((True, np.float32(exact)), (False, separate)):
        value = np.array([left])
        kernels.blend(value, np.array([right]), *weights, fused)
        assert value[0] == expected
    assert np.float32(exact) != separate
