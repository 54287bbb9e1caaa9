from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from simmerge_ray.base.errors import BanditError
from simmerge_ray.service.bandit.policy import NeuralLinearTS, Noise, SafeRule
from simmerge_ray.service.bandit.posterior import GaussianPosterior
from simmerge_ray.service.bandit.propensities import (
    Draws,
    _by_quadrature,
    _largest,
    safe_propensities,
    thompson_propensities,
    with_floor,
)

Z = np.array([1.0, 0.5])
LOCATIONS = st.lists(st.floats(-1, 1), min_size=1, max_size=7)


def draws_of(locations: list[float], seed: int) -> Draws:
    generator = np.random.default_rng(seed)
    count = len(locations)
    scales = 10.0 ** generator.uniform(-8, 1, count)
    return Draws(np.array(locations), scales)


@settings(max_examples=200, deadline=None)
@given(LOCATIONS, st.integers(0, 2**31))
def test_propensities_sum_to_one(locations, seed):
    propensities = thompson_propensities(draws_of(locations, seed))
    assert abs(propensities.sum() - 1) <= 1e-10
    assert (propensities >= 0).all()


@pytest.mark.parametrize("difference", [0.0, 5e-324, 1e-305, 1e-290, 1e-270, 1e-200, 1e-30])
def test_locations_that_are_hardly_different_are_as_good_as_equal(difference):
    scales = np.sqrt([2.9e-5, 7.2e-12, 1e-12])
    for apart in ([0.0, 1.0, difference], [difference, 0.0, 2 * difference]):
        found = thompson_propensities(Draws(np.array(apart), scales))
        equal = thompson_propensities(Draws(np.round(apart), scales))
        np.testing.assert_allclose(found, equal, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(LOCATIONS, st.integers(0, 2**31), st.floats(0, 0.5), st.data())
def test_the_safe_rule_leaves_less_often_the_higher_its_threshold(locations, seed, threshold, data):
    fixed = data.draw(st.integers(0, len(locations) - 1))
    draws = draws_of(locations, seed)
    low, high = (safe_propensities(draws, fixed, tau) for tau in (threshold, threshold + 0.1))
    for propensities in (low, high):
        assert propensities.sum() == pytest.approx(1.0, abs=1e-10) and (propensities >= 0).all()
    assert high[fixed] >= low[fixed] - 1e-9


@pytest.mark.parametrize("threshold", [3.0, 1e9, 1e13, 1e300])
def test_a_threshold_beyond_every_draw_never_leaves_the_fixed_arm(threshold):
    draws = Draws(np.array([0.4, 0.5, 0.6, 0.7, 0.2]), np.array([0.0, 0.01, 0.02, 0.03, 0.1]))
    assert safe_propensities(draws, 1, threshold) == pytest.approx([0.0, 1.0, 0.0, 0.0, 0.0], abs=1e-10)


def test_two_arms_have_a_closed_form():
    draws = Draws(np.array([0.1, 0.4]), np.array([0.2, 0.5]))
    spread = math.hypot(0.2, 0.5)
    assert thompson_propensities(draws)[1] == pytest.approx(norm.cdf(0.3 / spread), abs=1e-12)
    assert safe_propensities(draws, 0, 0.25)[1] == pytest.approx(norm.cdf((0.3 - 0.25) / spread), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=3), st.integers(0, 2**31), st.integers(1, 16))
def test_closed_forms_are_the_quadrature_they_stand_for(locations, seed, digits):
    location = np.round(locations, digits)  # few digits: ties and nearly ties
    draws = Draws(location, 10.0 ** np.random.default_rng(seed).uniform(-3, 0, len(location)))
    np.testing.assert_allclose(_largest(draws), _by_quadrature(draws), rtol=0, atol=1e-12)


def test_adaptive_quadrature_agrees():
    locations, scales = np.array([0.0, 0.2, -0.3, 0.1]), np.array([0.3, 0.1, 0.9, 0.2])
    frozen = [norm(m, s) for m, s in zip(locations, scales, strict=True)]
    for count in (3, 4):
        found = thompson_propensities(Draws(locations[:count], scales[:count]))
        for k in range(count):
            one, others = frozen[k], [frozen[j] for j in range(count) if j != k]
            expected, _ = quad(
                lambda s, one=one, others=others: one.pdf(s) * math.prod(other.cdf(s) for other in others),
                -np.inf,
                np.inf,
                limit=500,
            )
            assert found[k] == pytest.approx(expected, abs=1e-7)


def test_a_million_draws_agree():
    generator = np.random.default_rng(3)
    draws = Draws(np.array([0.30, 0.35, 0.20, 0.33]), np.array([0.05, 0.02, 0.20, 0.10]))
    sampled = draws.location + draws.scale * generator.normal(size=(1_000_000, 4))
    plain = np.bincount(sampled.argmax(1), minlength=4) / 1e6
    fixed, threshold = 1, 0.04
    others = np.where(np.arange(4) == fixed, -np.inf, sampled)
    chosen = np.where(others.max(1) - sampled[:, fixed] > threshold, others.argmax(1), fixed)
    safe = np.bincount(chosen, minlength=4) / 1e6
    for found, expected in (
        (thompson_propensities(draws), plain),
        (safe_propensities(draws, fixed, threshold), safe),
    ):
        assert (np.abs(found - expected) <= 4.5 * np.sqrt(found * (1 - found) / 1e6)).all()


def test_arms_without_spread_share_what_they_tie_for():
    found = thompson_propensities(Draws(np.array([0.5, 0.5, 0.1]), np.zeros(3)))
    np.testing.assert_allclose(found, [0.5, 0.5, 0.0], atol=1e-12)
    np.testing.assert_allclose(with_floor(found, 0.1), [0.45, 0.45, 0.1], atol=1e-12)
    assert thompson_propensities(Draws(np.array([3.0]), np.zeros(1))).tolist() == [1.0]


def policy(safe: SafeRule | None = None, floor: float = 0.0) -> NeuralLinearTS:
    generator = np.random.default_rng(0)
    posteriors = {}
    for number, arm in enumerate(("linear", "ties", "nuslerp")):
        seen = [(np.array([1.0, x]), 0.1 * number * x + 0.1 * generator.normal()) for x in generator.normal(size=12)]
        posteriors[arm] = GaussianPosterior.prior(2).fold(seen)
    return NeuralLinearTS(posteriors, Noise(0.05), safe, floor)


@pytest.mark.parametrize(
    ("safe", "floor"),
    [
        (None, 0.0),
        (SafeRule("linear", 0.05), 0.0),
        (SafeRule("linear", math.inf), 0.05),
        (SafeRule("ties", 0.02), 0.05),
    ],
)
def test_decisions_come_as_often_as_their_propensities_say(safe, floor):
    tried, count = policy(safe, floor), 10_000
    counts = Counter(tried.suggest(Z, str(number)).arm for number in range(count))
    propensities = tried.suggest(Z, "x").propensities
    assert propensities.sum() == pytest.approx(1.0, abs=1e-10)
    for arm, expected in zip(tried.arms, propensities, strict=True):
        assert counts[arm] / count == pytest.approx(expected, abs=4.5 * math.sqrt(0.25 / count))


def test_suggest_learns_nothing_and_can_be_replayed():
    tried = policy()
    first = tried.suggest(Z, "decision")
    for number in range(20):
        tried.suggest(Z, str(number))
    again = tried.suggest(Z, "decision")
    assert again.draws.tobytes() == first.draws.tobytes() and again.arm == first.arm
    assert (first.means == again.means).all() and first.explored


def test_a_later_arm_changes_no_other_draw():
    tried = policy()
    before = tried.suggest(Z, "decision")
    tried.add_arm("sce", GaussianPosterior.prior(2, mean=tried.posterior("ties").mean))
    after = tried.suggest(Z, "decision")
    assert after.draws[:3].tobytes() == before.draws.tobytes() and after.arms[3] == "sce"
    assert after.means[3] == pytest.approx(tried.posterior("ties").marginal(Z)[0])
    with pytest.raises(BanditError, match="exists"):
        tried.add_arm("sce", GaussianPosterior.prior(2))


def test_without_exploration_the_best_mean_is_played():
    tried = policy(SafeRule("linear", 0.01), floor=0.1)
    found = tried.suggest(Z, "d", explore=False)
    best = max(tried.arms, key=lambda arm: tried.posterior(arm).marginal(Z)[0])
    assert found.arm == best and found.propensities[found.arms.index(best)] == 1.0 and not found.explored
    assert policy(SafeRule("linear", 10.0), 0.1).suggest(Z, "d", explore=False).arm == "linear"


def test_identical_arms_are_played_as_one():
    tried = policy(SafeRule("linear", 0.0))
    tried.update([("ties", Z, 0.1)] * 5)
    found = tried.suggest(Z, "d", classes=[("ties", "nuslerp")])
    assert found.arms == ("linear", "ties")  # seen more often here than nuslerp
    assert found.propensities.sum() == pytest.approx(1.0, abs=1e-10)
    assert tried.suggest(Z, "d", classes=[("linear", "ties", "nuslerp")]).propensities.tolist() == [1.0]


def test_the_safe_rule_holds_where_the_fixed_arm_has_a_twin():
    tried = policy(SafeRule("linear", math.inf), floor=0.01)
    tried.update([("ties", Z, 0.1)] * 5)  # seen more often than linear
    twins = [("nuslerp",), ("ties", "linear")]
    found = tried.suggest(Z, "d", classes=twins)
    assert sorted(found.arms) == ["linear", "nuslerp"]
    assert found.propensities[found.arms.index("linear")] == pytest.approx(0.99, abs=1e-12)
    without = tried.suggest(Z, "d", classes=twins, among=("ties", "nuslerp"))  # ties makes the fixed arm's merge
    assert without.propensities[without.arms.index("ties")] == pytest.approx(0.99, abs=1e-12)


def test_rewards_move_the_posterior_of_their_arm_alone():
    tried = policy()
    before = {arm: tried.posterior(arm) for arm in tried.arms}
    tried.update([("ties", Z, 1.0), ("ties", Z, 1.0)])
    assert tried.posterior("linear") is before["linear"]
    assert tried.posterior("ties").count == before["ties"].count + 2
    assert tried.posterior("ties").marginal(Z)[0] > before["ties"].marginal(Z)[0]
    tried.discount(0.5)
    assert tried.posterior("ties").weight < before["ties"].weight + 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NeuralLinearTS({}, Noise(1.0)), "arm"),
        (lambda: policy(SafeRule("tie", 0.1)), "did you mean 'ties'"),
        (lambda: policy(floor=0.4), "floor"),
        (lambda: policy(SafeRule("ties", math.inf)), "never learns"),
        (lambda: policy().suggest(Z, "d", among=["slerp"]), "slerp"),
        (lambda: policy().update([("slerp", Z, 0.0)]), "slerp"),
        (lambda: policy().add_arm("sce", GaussianPosterior.prior(3)), "dimensions"),
        (lambda: Noise(0.0), "variance"),
    ],
)
def test_what_cannot_be_played_is_refused(make, said):
    with pytest.raises(BanditError, match=said):
        make()
