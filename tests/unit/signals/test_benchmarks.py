"""The statistics of the benchmarks of signals."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks.signals.probes import resampled, subsets, weighted_spearman
from benchmarks.signals.signs import MIN_GAP, correlations, normalised_utility, verdict


@pytest.mark.parametrize("levels", [3, 1000])  # many ties, none
def test_weighted_spearman_is_that_of_repeated_rows(levels):
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, levels, (2, 4, 21)).astype(float)
    weights = np.concatenate([np.ones((21, 1)), generator.integers(0, 4, (21, 5))], axis=1)
    found = weighted_spearman(x, y, weights)
    for row in range(4):
        for column in range(6):
            repeats = weights[:, column].astype(int)
            expected = spearmanr(np.repeat(x[row], repeats), np.repeat(y[row], repeats)).statistic
            assert found[row, column] == pytest.approx(expected, abs=1e-12)


def test_a_constant_has_no_rank_correlation():
    assert np.isnan(weighted_spearman(np.ones(7), np.arange(7.0), np.ones((7, 2)))).all()
    assert np.isnan(weighted_spearman(np.arange(7.0), np.arange(7.0), np.zeros((7, 1)))).all()


def test_resamples_draw_as_many_checkpoints_and_begin_with_all_of_them():
    drawn = resampled(12, 30, seed=1)
    assert drawn.shape == (12, 31)
    assert (drawn[:, 0] == 1).all()
    assert (drawn.sum(0) == 12).all()


@pytest.mark.parametrize("size", [4, 8, 16])
def test_subsets_come_in_disjoint_halves_with_equal_shares_of_the_groups(size):
    groups = np.split(np.arange(32), 4)
    found = subsets(groups, size, 6, np.random.default_rng(0))
    assert len(found) == 6
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert not set(first) & set(second)
        for subset in (first, second):
            assert [int(np.isin(group, subset).sum()) for group in groups] == [size // 4] * 4


def test_the_whole_set_is_one_subset():
    (whole,) = subsets([np.arange(48)], 48, 20, np.random.default_rng(0))
    assert (whole == np.arange(48)).all()


def test_utility_is_a_share_of_the_way_from_the_base_to_the_best():
    assert normalised_utility(0.5, 0.25, 0.75) == 0.5
    assert normalised_utility(0.25, 0.25, 0.75) == 0.0
    assert normalised_utility(0.9, 0.8, 0.8 + 0.9 * MIN_GAP) is None


@pytest.mark.parametrize(
    ("low", "high", "q", "sign", "expected"),
    [
        (0.1, 0.6, 0.01, 1, "holds"),
        (0.1, 0.6, 0.01, -1, "contradicted"),
        (-0.1, 0.6, 0.01, 1, "undecided"),
        (0.1, 0.6, 0.2, 1, "undecided"),
    ],
)
def test_a_claim_is_decided_only_without_zero_and_after_the_correction(low, high, q, sign, expected):
    assert verdict({"rho": 0.3, "low": low, "high": high, "q": q}, sign) == expected


@pytest.mark.parametrize(("of_checkpoints", "of_pairs"), [(1.0, 0.0), (0.0, 1.0)])
def test_the_interval_of_unrelated_values_holds_zero(of_checkpoints, of_pairs):
    """At 5 % of false alarms more than 9 of 60 have a probability of 1e-3; with noise of pairs only there are fewer."""
    generator = np.random.default_rng(0)
    pairs = np.array([(i, j) for i in range(12) for j in range(i) if i // 3 != j // 3])

    def values():
        effects = of_checkpoints * generator.normal(size=12)
        return (effects[pairs].sum(1) + of_pairs * generator.normal(size=len(pairs)))[None]

    found = [correlations(values(), values(), pairs, resampled(12, 300, seed)) for seed in range(60)]
    assert sum(bool(one["low"][0, 0] > 0 or one["high"][0, 0] < 0) for one in found) <= 9
