"""RegMean with Gram matrices: the reference, and what its equations say in special cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simmerge_ray.base.errors import OperatorError
from simmerge_ray.plans.operators.linear import linear
from simmerge_ray.plans.operators.regmean import regmean
from tests import reference
from tests.operators import assert_same, tensors

WEIGHTS = (0.3, 0.7, 1.6)


def setting(count=3, shape=(7, 5), axis=1, num_rows=40, seed=0):
    """(tensors, inputs of each, their Gram matrices), float64."""
    sources = tensors(shape, seed=seed, count=count)[1:]
    generator = torch.Generator().manual_seed(seed + 100)
    size = shape[axis]
    inputs = [
        torch.randn((num_rows, size), generator=generator, dtype=torch.float64)
        @ torch.randn((size, size), generator=generator, dtype=torch.float64)
        for _ in range(count)
    ]
    return sources, inputs, [x.T @ x / num_rows for x in inputs]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(7, 5), (1, 3), (16, 33)])
def test_equals_the_slow_reference(axis, alpha, shape):
    sources, _, grams = setting(shape=shape, axis=axis, num_rows=80)
    result = regmean(None, sources, WEIGHTS, alpha=alpha, grams=grams, input_axis=axis)
    expected = reference.regmean(None, [s.numpy() for s in sources], WEIGHTS, alpha, [g.numpy() for g in grams], axis)
    # the condition of a sum of Gram matrices of 80 rows in 33 dimensions
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("axis", [0, 1])
def test_outputs_are_nearest_to_those_of_every_source_on_its_own_inputs(axis):
    sources, inputs, grams = setting(axis=axis)
    merged = regmean(None, sources, WEIGHTS, alpha=1.0, grams=grams, input_axis=axis)

    def distance(matrix):
        turned = [one if axis == 0 else one.T for one in (matrix, *sources)]
        parts = zip(WEIGHTS, inputs, turned[1:], strict=True)
        return float(sum(w * ((x @ turned[0] - x @ own) ** 2).sum() for w, x, own in parts))

    lowest = distance(merged)
    assert lowest < distance(linear(None, sources, WEIGHTS))
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        assert lowest < distance(merged + 1e-3 * torch.randn(merged.shape, generator=generator, dtype=merged.dtype))


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_one_source_or_equal_sources_are_the_source(alpha, axis):
    sources, _, grams = setting(axis=axis)
    assert_same(regmean(None, sources[:1], [0.7], alpha=alpha, grams=grams[:1], input_axis=axis), sources[0])
    equal = [sources[0]] * 3
    assert_same(regmean(None, equal, WEIGHTS, alpha=alpha, grams=grams, input_axis=axis), sources[0])


def test_alpha_zero_averages_every_input_by_its_strength():
    sources, _, grams = setting()
    strengths = torch.stack([w * gram.diagonal() for w, gram in zip(WEIGHTS, grams, strict=True)])
    expected = (strengths[:, None] * torch.stack(sources)).sum(0) / strengths.sum(0)
    assert_same(regmean(None, sources, WEIGHTS, alpha=0.0, grams=grams), expected)


def test_equal_gram_matrices_give_the_average():
    sources, _, grams = setting()
    assert_same(regmean(None, sources, WEIGHTS, grams=[grams[0]] * 3), linear(None, sources, WEIGHTS))


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_inputs_that_no_source_has_seen_are_averaged(alpha):
    sources, _, grams = setting()
    for gram in grams:
        gram[2], gram[:, 2] = 0.0, 0.0
    result = regmean(None, sources, WEIGHTS, alpha=alpha, grams=grams)
    assert_same(result[:, 2], linear(None, sources, WEIGHTS)[:, 2])
    assert not torch.allclose(result[:, 1], linear(None, sources, WEIGHTS)[:, 1])


def test_fewer_rows_than_dimensions_are_solved_too():
    sources, inputs, grams = setting(shape=(4, 30), num_rows=5)
    merged = regmean(None, sources, WEIGHTS, alpha=1.0, grams=grams)
    assert bool(torch.isfinite(merged).all()) and float(merged.abs().max()) < 10
    for x, own in zip(inputs, sources, strict=True):  # 15 rows in 30 dimensions: every source's outputs are kept
        np.testing.assert_allclose((x @ merged.T).numpy(), (x @ own.T).numpy(), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_one_error():
    sources, _, grams = setting()
    with pytest.raises(OperatorError, match=r"3 tensors of \(7, 5\) need as many Gram matrices of \(5, 5\)"):
        regmean(None, sources, WEIGHTS, grams=grams[:2])
    with pytest.raises(OperatorError, match="sum to 0"):
        regmean(None, sources, (0.0, 0.0, 0.0), grams=grams)
