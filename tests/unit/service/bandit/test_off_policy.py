from __future__ import annotations

import numpy as np
import pytest

from simmerge_ray.base.errors import BanditError
from simmerge_ray.service.bandit.alarm import regret_slope
from simmerge_ray.service.bandit.off_policy import ValueEstimate, doubly_robust, doubly_robust_gain

MEANS = np.array([0.2, 0.5, 0.9])
LOGGED, TARGET = np.array([0.6, 0.3, 0.1]), np.array([0.1, 0.2, 0.7])


def log(count: int = 40_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    arms = generator.choice(3, count, p=LOGGED)
    return arms, MEANS[arms] + 0.1 * generator.normal(size=count)


def without_model(rewards: np.ndarray, target: np.ndarray, logged: np.ndarray) -> ValueEstimate:
    """With a model that knows nothing the estimate is `mean(w r)`: inverse propensity scoring."""
    nothing = np.zeros(len(rewards))
    return doubly_robust(rewards, target, logged, nothing, nothing)


def test_estimates_find_the_other_policy_s_value():
    arms, rewards = log()
    truth = float(TARGET @ MEANS)
    model = MEANS + np.array([0.1, -0.1, 0.05])  # a model that is wrong
    estimates = [
        without_model(rewards, TARGET[arms], LOGGED[arms]),
        doubly_robust(rewards, TARGET[arms], LOGGED[arms], model[arms], np.full(len(arms), TARGET @ model)),
    ]
    for estimate in estimates:
        assert estimate.value == pytest.approx(truth, abs=4 * estimate.standard_error)
        assert 0 < estimate.standard_error < 0.02
        assert estimate.effective == pytest.approx(len(arms) / (TARGET**2 / LOGGED).sum(), rel=0.05)
    assert estimates[1].standard_error < estimates[0].standard_error


def test_standard_errors_are_those_of_repeated_logs():
    estimates = [without_model(r, TARGET[a], LOGGED[a]) for a, r in (log(2000, seed) for seed in range(200))]
    spread = np.std([one.value for one in estimates])
    assert np.mean([one.standard_error for one in estimates]) == pytest.approx(spread, rel=0.15)


def test_the_logged_policy_estimates_itself():
    arms, rewards = log(1000)
    estimate = without_model(rewards, LOGGED[arms], LOGGED[arms])
    assert estimate.value == pytest.approx(rewards.mean()) and estimate.effective == pytest.approx(1000)


def test_what_cannot_be_estimated_is_refused():
    one = np.ones(3)
    with pytest.raises(BanditError, match="propensity is 0"):
        without_model(one, one, np.array([0.5, 0.0, 0.5]))
    with pytest.raises(BanditError, match="outside"):
        without_model(one, 2 * one, one)
    with pytest.raises(BanditError, match="two decisions"):
        without_model(one[:1], one[:1], one[:1])


def test_the_alarm_rings_for_a_straight_line_and_not_for_a_root():
    rounds = np.arange(1, 401)
    generator = np.random.default_rng(0)
    straight = 0.1 + 0.05 * generator.normal(size=400)
    root = 0.5 / np.sqrt(rounds) * (1 + 0.3 * generator.normal(size=400))
    assert regret_slope(straight).linear and regret_slope(straight).slope == pytest.approx(1.0, abs=0.1)
    found = regret_slope(root)
    assert not found.linear and found.slope == pytest.approx(0.5, abs=0.15) and found.low <= found.slope <= found.high
    assert regret_slope(straight[:20]) is None and regret_slope(-straight) is None


def test_the_gain_of_a_policy_is_the_difference_of_two_estimates_with_less_error():
    generator = np.random.default_rng(3)
    logged = generator.uniform(0.2, 0.8, 400)
    predicted, expected, other = generator.random((3, 400))
    rewards = predicted + generator.normal(scale=0.2, size=400)
    target = (generator.random(400) < 0.5).astype(float)
    reference = np.where(np.arange(400) < 380, target, 1 - target)
    expected_reference = np.where(np.arange(400) < 380, expected, other)
    gain = doubly_robust_gain(rewards, target, reference, logged, predicted, expected - expected_reference)
    first = doubly_robust(rewards, target, logged, predicted, expected)
    second = doubly_robust(rewards, reference, logged, predicted, expected_reference)
    assert gain.value == pytest.approx(first.value - second.value, abs=1e-12)
    assert gain.standard_error < first.standard_error / 2
    assert 10 < gain.effective <= 20  # they differ in the last twenty
    same = doubly_robust_gain(rewards, target, target, logged, predicted, np.zeros(400))
    assert (same.value, same.standard_error, same.effective) == (0.0, 0.0, 0.0)
