"""Ways of choosing: laws of the split-half oracle, of the best arm of the other pairs, and of the table."""

from __future__ import annotations

import numpy as np
import pytest

from simmerge_ray.research.choosing import best_elsewhere, compare_ways, split_half_oracle, taken, utility
from simmerge_ray.research.pair_sample import PairSample

PAIRS = [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]


def items(*shares: float, num_items: int = 400, seed: int = 0) -> dict[str, np.ndarray]:
    """Of a task for each share, 0 or 1 an item."""
    generator = np.random.default_rng(seed)
    return {f"t{number}": (generator.random(num_items) < share) * 1.0 for number, share in enumerate(shares)}


def test_tasks_count_the_same_whatever_their_number_of_items():
    assert utility({"t0": np.ones(4), "t1": np.zeros(12)}) == 0.5


def test_the_oracle_of_one_option_is_its_utility():
    one = items(0.3, 0.9)
    assert split_half_oracle({"one": one}) == pytest.approx(utility(one))
    assert split_half_oracle({"one": one, "twin": dict(one)}) == pytest.approx(utility(one))


def test_the_oracle_finds_what_is_clearly_better():
    better = items(0.9, 0.9, seed=1)
    assert split_half_oracle({"worse": items(0.2, 0.3), "better": better}) == pytest.approx(utility(better))


def test_the_oracle_is_not_inflated_by_the_noise_of_equal_options():
    """Twenty options of utility 0.5 on 40 items: the best of them looks like 0.64; the mean of 200 oracles has a
    standard error of 0.004."""
    found, largest = [], []
    for seed in range(200):
        options = {str(number): items(0.5, num_items=40, seed=1000 * seed + number) for number in range(20)}
        found.append(split_half_oracle(options))
        largest.append(max(utility(one) for one in options.values()))
    assert np.mean(found) == pytest.approx(0.5, abs=0.02) and np.mean(largest) > 0.6


def test_the_best_arm_of_a_pair_is_chosen_without_it():
    utilities = np.array([[1.0, 0.0], [0.4, 0.5], [0.4, 0.5]])
    assert best_elsewhere(utilities).tolist() == [1, 0, 0]  # the first pair alone prefers the first arm
    assert best_elsewhere(np.array([[0.9, np.nan], [0.1, 0.5], [0.1, 0.45]])).tolist() == [1, 0, 0]


def test_pairs_that_share_a_checkpoint_do_not_choose():
    utilities = np.array([[0.1, 0.2], [0.9, 0.0], [0.9, 0.0], [0.3, 0.4]])
    assert best_elsewhere(utilities)[0] == 0
    assert best_elsewhere(utilities, PAIRS)[0] == 1  # of ("a", "c") only ("b", "d") has neither
    alone = best_elsewhere(utilities[:2], PAIRS[:2])
    assert alone.tolist() == [-1, -1] and np.isnan(taken(utilities[:2], alone)).all()
    assert taken(utilities, np.array([1, 0, -1, 0]))[[0, 1, 3]].tolist() == [0.2, 0.9, 0.3]


def test_a_gain_that_is_the_same_for_all_pairs_has_no_width():
    low = np.array([0.1, 0.5, 0.3, 0.9])
    rows = {
        row["way"]: row for row in compare_ways(PairSample(tuple(PAIRS)), {"low": low, "high": low + 0.25}, ("low",))
    }
    assert rows["low"]["utility"] == pytest.approx(low.mean()) and rows["low"]["over"] == {}
    gain = rows["high"]["over"]["low"]
    assert gain["value"] == pytest.approx(0.25) and gain["interval"] == pytest.approx([0.25, 0.25])
    low_end, high_end = rows["low"]["interval"]
    assert low_end < low.mean() < high_end


def test_pairs_that_a_way_says_nothing_of_are_left_out_on_both_sides():
    ways = {
        "all": np.array([0.1, 0.5, 0.3, 0.9]),
        "some": np.array([0.2, np.nan, 0.4, np.nan]),
        "none": np.full(4, np.nan),
    }
    rows = {row["way"]: row for row in compare_ways(PairSample(tuple(PAIRS)), ways, ("all",))}
    assert (rows["some"]["num_pairs"], rows["some"]["utility"]) == (2, pytest.approx(0.3))
    assert rows["some"]["over"]["all"]["value"] == pytest.approx(0.1)
    assert (rows["none"]["num_pairs"], rows["none"]["utility"], rows["none"]["interval"]) == (0, None, None)
