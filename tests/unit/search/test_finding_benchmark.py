"""What the benchmark of finding rests on: results that survive a kill, candidates, and intervals over checkpoints."""

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks.finding.candidates import AVERAGE, fixed_grid, weighted
from benchmarks.finding.kept import Kept
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.research.pair_sample import PairSample

PAIRS = tuple(combinations("abcdef", 2))


def test_results_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    first = Kept(tmp_path, "values", "one")
    assert [first.of("x", lambda: 1), first.of("y", lambda: [2.5])] == [1, [2.5]]
    file = tmp_path / "values-one.jsonl"
    file.write_text(file.read_text() + '["z", 3')
    second = Kept(tmp_path, "values", "one")
    assert [second.of(key, lambda: 7) for key in "xyz"] == [1, [2.5], 7]
    other = Kept(tmp_path, "values", "two")  # another writer reads all
    assert [other.of(key, lambda: 8) for key in "xyzw"] == [1, [2.5], 7, 8]


def test_the_grid_has_48_candidates_with_base_and_parents_as_they_are():
    grid = fixed_grid("a", "b")
    assert len(grid) == 48
    assert [grid[name] for name in ("0/0", "1/0", "0/1")] == [MergePlan(source=name) for name in ("base", "a", "b")]
    assert grid[AVERAGE].recipe.weights == (0.5, 0.5)
    assert weighted("a", "b", 1.0, 0.0, "ties", density=0.3).is_merge  # a trimmed parent is no parent


def test_an_interval_draws_checkpoints_and_holds_the_mean():
    sample = PairSample(PAIRS)
    generator = np.random.default_rng(0)
    of_checkpoint = dict(zip("abcdef", generator.normal(size=6), strict=True))
    values = [of_checkpoint[a] + of_checkpoint[b] for a, b in PAIRS]
    found = sample.mean(values)
    low, high = found["interval"]
    assert found["mean"] == pytest.approx(np.mean(values))
    assert low < found["mean"] < high
    # Pairs that share a checkpoint move together: wider than if every pair were drawn by itself.
    alone = np.std([np.mean(generator.choice(values, len(values))) for _ in range(500)])
    assert high - low > 2 * 1.96 * 1.3 * alone
    assert sample.mean([0.25] * len(PAIRS))["interval"] == pytest.approx([0.25, 0.25])


def test_a_ratio_is_that_of_sums():
    above, below = np.arange(1.0, 16.0), np.full(15, 4.0)
    assert PairSample(PAIRS).ratio(above, below)["mean"] == pytest.approx(2.0)


def test_a_pooled_rank_correlation_ranks_all_values_together():
    generator = np.random.default_rng(1)
    left, right = generator.normal(size=(2, 15, 7))
    found = PairSample(PAIRS).pooled_spearman(list(left), list(right))
    assert found["mean"] == pytest.approx(spearmanr(left.ravel(), right.ravel()).statistic)
    assert PairSample(PAIRS).pooled_spearman(list(left), list(left))["interval"] == pytest.approx([1.0, 1.0])
