"""When the best fixed arm is left, which pairs are not answered, and what the intervals cover."""

from __future__ import annotations

import math

import numpy as np
import pytest

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import SelectorError
from simmerge_ray.selector.data.scoring import Scoring, units_of
from simmerge_ray.selector.data.splits import pairs_of
from simmerge_ray.selector.models.novelty import fit_novelty
from simmerge_ray.selector.models.policy import fit_intervals, fit_override
from simmerge_ray.selector.models.train import train_selector
from tests.unit.selector.made_up import ARMS, planted

RIDGE = TrainConfig(model="ridge")


def override_of(dataset, predicted):
    scoring = Scoring.of(dataset.contexts, dataset.arms)
    return fit_override(scoring, dataset.arms, units_of(dataset.contexts, True), pairs_of(dataset.contexts), predicted)


def test_the_best_fixed_arm_is_left_where_that_pays():
    dataset = planted(8)
    override = override_of(dataset, dataset.utilities)
    assert override.gain is not None and override.gain > 0.1 and override.threshold < 0.1
    assert override.unit == "GapClosed" and 0.2 < override.share < 0.9


def test_the_best_fixed_arm_is_kept_where_predictions_are_noise():
    kept = 0
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(size=(56, 3))
        kept += math.isinf(override_of(planted(8, seed=seed), noise).threshold)
    assert kept >= 17  # a gain above its standard error by chance is rare; all 20 would ask for too much


def test_a_selector_overrides_and_says_why():
    dataset = planted(8)
    selector = train_selector(dataset, RIDGE)
    choices = [selector.choose(dataset.features[row : row + 2]) for row in range(0, 56, 2)]
    assert {choice.arm for choice in choices} >= {"linear", "ties"}
    for choice in choices:
        assert choice.overrode == (choice.arm != selector.best_fixed)
        if choice.overrode:
            assert choice.advantage > selector.override.threshold and "more than" in choice.reason


def test_without_anything_to_learn_it_stays_with_the_best_fixed_arm():
    dataset = planted(8, learnable=False, seed=2)
    selector = train_selector(dataset, RIDGE)
    choice = selector.choose(dataset.features[:2])
    if math.isinf(selector.override.threshold):
        assert choice.arm == selector.best_fixed and "best fixed arm" in choice.reason


def test_features_far_away_are_not_answered():
    dataset = planted(8)
    selector = train_selector(dataset, RIDGE)
    known = selector.distances(dataset.features)
    assert (known <= selector.novelty.limit).all()
    choice = selector.choose(dataset.features[:2] + 30.0)
    assert choice.arm == selector.best_fixed and not choice.overrode
    assert choice.reason.startswith("not trained for such checkpoints") and choice.distance > selector.novelty.limit
    fresh = planted(8, seed=5)
    assert (selector.distances(fresh.features) > selector.novelty.limit).mean() < 0.2


def test_the_limit_is_that_of_pairs_which_share_no_checkpoint():
    generator = np.random.default_rng(0)
    centres = 5.0 * generator.normal(size=(8, 4))
    pairs = [(f"c{i}", f"c{j}") for i in range(8) for j in range(i + 1, 8)]
    features = np.array([[centres[i] + centres[j]] * 2 for i in range(8) for j in range(i + 1, 8)])
    novelty = fit_novelty(features, pairs, 1.0)
    rows = features[:, 0]
    expected = []
    for index, pair in enumerate(pairs):
        strangers = [k for k, other in enumerate(pairs) if not set(pair) & set(other) for _ in range(2)]
        distances = sorted(np.sqrt(((rows[strangers] - rows[index]) ** 2).mean(1)))
        expected.append(np.mean(distances[:5]))
    assert novelty.limit == pytest.approx(max(expected))
    assert novelty.distances(features).max() < novelty.limit


def test_a_star_of_pairs_is_compared_with_all_but_itself():
    features = np.arange(6.0).reshape(6, 1, 1).repeat(2, axis=1)
    novelty = fit_novelty(features, [("hub", f"c{i}") for i in range(6)], 1.0)
    assert 0 < novelty.limit < 5


def test_intervals_cover_what_was_left_out():
    generator = np.random.default_rng(0)
    scale = np.array([0.05, 0.2])
    intervals = fit_intervals([scale * generator.normal(size=(50, 2)) for _ in range(4)], 200)
    assert intervals is not None
    fresh = np.abs(scale * generator.normal(size=(20000, 2)))
    for level, widths in zip(intervals.levels, intervals.half_widths, strict=True):
        assert np.abs((fresh <= widths).mean(0) - level).max() < 0.06  # 200 residuals: two standard errors and a bit
    assert fit_intervals([], 0) is None


def test_intervals_of_a_selector_cover_new_checkpoints():
    selector = train_selector(planted(10), RIDGE)
    fresh = planted(10, seed=9)
    errors = np.abs(selector.predict(fresh.features)[0] - fresh.utilities)
    for level in selector.intervals.levels:
        assert (errors <= selector.half_widths(level)).mean() > level - 0.1
    with pytest.raises(SelectorError, match="no interval of level 0.42; known: 0.5"):
        selector.half_widths(0.42)


def test_too_few_checkpoints_to_leave_out_give_no_override_and_no_interval():
    selector = train_selector(planted(4).subset(range(8)), RIDGE)
    assert math.isinf(selector.override.threshold) and selector.override.gain is None
    with pytest.raises(SelectorError, match="no intervals"):
        selector.half_widths(0.9)
    assert selector.best_fixed in ARMS
