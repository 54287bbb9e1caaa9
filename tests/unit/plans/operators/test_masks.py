"""How many and which entries are kept: exact for trims and bands, within statistics for random masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.plans.operators.breadcrumbs import band, kept_band
from simmerge_ray.plans.operators.della import keep_probabilities
from simmerge_ray.plans.operators.masks import bernoulli, largest, masked
from simmerge_ray.plans.operators.shares import kept_count
from simmerge_ray.plans.operators.table import OPERATORS
from simmerge_ray.plans.operators.ties import trim
from tests import reference

SIZES = [1, 7, 50, 2112, 8192]
DENSITIES = [0.01, 0.2, 0.5, 0.999, 1.0]


def vector(num_entries: int) -> torch.Tensor:
    return torch.randn(num_entries, generator=torch.Generator().manual_seed(num_entries))


def num_kept(tensor: torch.Tensor) -> int:
    return int((tensor != 0).sum())


@pytest.mark.parametrize("num_entries", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
def test_trimming_keeps_exactly_the_stated_count(num_entries, density):
    kept = num_kept(trim(vector(num_entries), density))
    assert kept == max(1, int(density * num_entries)) == kept_count(density, num_entries)


def test_trimming_keeps_the_first_of_equal_magnitudes():
    equal = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.5])
    assert trim(equal, 0.4).tolist() == [1.0, -1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("num_entries", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
def test_breadcrumbs_keep_exactly_the_stated_count(num_entries, density, gamma):
    values = vector(num_entries)
    kept = band(values, density, gamma)
    assert num_kept(kept) == int(density * num_entries) == kept_band(density, gamma, num_entries)[1]
    dropped = values.abs()[kept == 0]
    above = int((dropped > kept.abs().max()).sum()) if num_kept(kept) else 0
    assert num_kept(kept) == 0 or above == min(int(gamma * num_entries), num_entries - num_kept(kept))


def test_breadcrumbs_drop_the_largest_and_the_smallest():
    assert band(torch.tensor([5.0, -4.0, 3.0, -2.0, 1.0]), 0.4, 0.2).tolist() == [0.0, -4.0, 3.0, 0.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), max_size=20), st.integers(0, 22), st.integers(0, 22))
def test_masks_of_the_largest_are_exact_and_nested(values, first, second):
    small, big = (largest(torch.tensor(values), count) for count in sorted((first, second)))
    assert int(small.sum()) == min(min(first, second), len(values))
    assert not bool((small & ~big).any())


def test_an_empty_tensor_stays_empty():
    empty = torch.zeros(0, 4)
    for name in ("linear", "slerp", "nuslerp", "ties", "breadcrumbs", "sce", "model_stock", "karcher", "multislerp"):
        assert OPERATORS[name](empty, [empty, empty], [1.0, 1.0]).shape == (0, 4)
    for name in ("dare_ties", "della"):
        assert OPERATORS[name](empty, [empty, empty], [1.0, 1.0], seeds=(1, 2)).shape == (0, 4)


@pytest.mark.parametrize("num_entries", SIZES)
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_random_masks_keep_the_stated_share(num_entries, density):
    like = torch.ones(num_entries)
    kept = [float(bernoulli(density, like, seed).sum()) for seed in range(30)]
    # Six standard deviations of the mean of 30 sums of n draws: an accidental failure is as likely as 2e-9, and the
    # seeds are fixed.
    spread = 6 * math.sqrt(density * (1 - density) * num_entries / 30)
    assert abs(np.mean(kept) - density * num_entries) < spread


@pytest.mark.parametrize("num_entries", SIZES)
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.2, 0.0), (0.9, 0.05)])
def test_keep_probabilities_have_the_density_as_mean_and_grow_with_magnitude(num_entries, density, epsilon):
    values = vector(num_entries)
    probabilities = keep_probabilities(values, density, epsilon)
    assert float(probabilities.double().mean()) == pytest.approx(density, abs=1e-6)  # float32 probabilities
    ordered = probabilities[values.abs().argsort()]
    assert bool((ordered.diff() >= 0).all())
    if num_entries > 1:
        assert float(ordered[0]) == pytest.approx(density - epsilon)
        assert float(ordered[-1]) == pytest.approx(density + epsilon)
    kept = np.mean([float(bernoulli(probabilities, values, seed).sum()) for seed in range(30)])
    # As above; the spread of draws with unequal probabilities is no larger.
    assert abs(kept - density * num_entries) < 6 * math.sqrt(density * (1 - density) * num_entries / 30)


def test_keep_probabilities_rank_within_rows():
    values = torch.tensor([[1.0, -3.0, 2.0], [30.0, 10.0, 20.0]])
    expected = torch.tensor([[0.25, 0.75, 0.5], [0.75, 0.25, 0.5]])
    torch.testing.assert_close(keep_probabilities(values, 0.5, 0.25), expected)
    np.testing.assert_allclose(reference.rank_probabilities(values.numpy(), 0.5, 0.25), expected, rtol=1e-6)


@pytest.mark.parametrize("num_entries", SIZES)
def test_rescaling_restores_the_l1_norm(num_entries):
    values = vector(num_entries).double()
    mask = bernoulli(0.5, values, seed=1)
    kept = masked(values, mask, rescale=True)
    assert bool((kept[~mask] == 0).all())
    if bool(mask.any()):
        assert float(kept.abs().sum()) == pytest.approx(float(values.abs().sum()), rel=1e-12)
    assert num_kept(masked(values, torch.zeros_like(mask), rescale=True)) == 0


def test_a_mask_does_not_depend_on_the_dtype_of_the_tensor():
    single, double = torch.ones(64), torch.ones(64, dtype=torch.float64)
    assert torch.equal(bernoulli(0.5, single, seed=3), bernoulli(0.5, double, seed=3))
