from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.base.errors import BanditError
from simmerge_ray.service.bandit.posterior import GaussianPosterior


def observations(count: int, dimensions: int, seed: int = 0) -> list[tuple[np.ndarray, float]]:
    generator = np.random.default_rng(seed)
    return [(generator.normal(size=dimensions), float(generator.normal())) for _ in range(count)]


def test_a_prior_that_has_seen_nothing_predicts_its_mean():
    mean = np.array([0.5, -1.0, 2.0])
    prior = GaussianPosterior.prior(3, ridge=4.0, mean=mean)
    np.testing.assert_allclose(prior.mean, mean, rtol=1e-15)
    predicted, spread = prior.marginal(np.array([0.0, 2.0, 0.0]))
    assert predicted == pytest.approx(-2.0, rel=1e-14) and spread == pytest.approx(1.0, rel=1e-14)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(0, 40), st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_equals_the_normal_equations(dimensions, count, ridge, seed):
    seen = observations(count, dimensions, seed)
    posterior = GaussianPosterior.prior(dimensions, ridge).fold(seen)
    z = np.array([row for row, _ in seen]).reshape(count, dimensions)
    rewards = np.array([reward for _, reward in seen])
    precision = ridge * np.eye(dimensions) + z.T @ z
    np.testing.assert_allclose(posterior.precision, precision, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(posterior.mean, np.linalg.solve(precision, z.T @ rewards), rtol=1e-8, atol=1e-12)
    asked = np.ones(dimensions)
    expected = np.sqrt(asked @ np.linalg.solve(precision, asked))
    assert posterior.marginal(asked)[1] == pytest.approx(expected, rel=1e-9)
    assert posterior.count == count and posterior.sum_squares == pytest.approx(float(rewards @ rewards))


def test_the_same_observations_in_the_same_order_give_the_same_bits():
    seen = observations(30, 5)
    whole = GaussianPosterior.prior(5).fold(seen)
    halves = GaussianPosterior.prior(5).fold(seen[:11]).fold(seen[11:])
    assert whole.precision.tobytes() == halves.precision.tobytes() and whole.moment.tobytes() == halves.moment.tobytes()
    assert (whole.precision == whole.precision.T).all()


def test_a_discount_leaves_the_prior_whole():
    prior = GaussianPosterior.prior(3, ridge=2.0, mean=np.ones(3))
    posterior = prior.fold(observations(20, 3))
    assert posterior.discounted(1.0, prior).precision.tobytes() == posterior.precision.tobytes()
    half = posterior.discounted(0.5, prior)
    np.testing.assert_allclose(half.precision, prior.precision + 0.5 * (posterior.precision - prior.precision))
    assert half.weight == 10.0
    faded = posterior
    for _ in range(200):
        faded = faded.discounted(0.5, prior)
    np.testing.assert_allclose(faded.mean, prior.mean, rtol=1e-12)


@pytest.mark.parametrize(
    ("z", "reward", "said"),
    [
        ([1.0], 0.0, "shape"),
        ([1.0, np.nan], 0.0, "finite"),
        ([1.0, 0.0], np.inf, "reward"),
    ],
)
def test_what_cannot_be_learned_is_refused(z, reward, said):
    with pytest.raises(BanditError, match=said):
        GaussianPosterior.prior(2).updated(np.array(z), reward)


def test_a_prior_needs_a_ridge_and_a_discount_a_factor():
    with pytest.raises(BanditError, match="ridge"):
        GaussianPosterior.prior(2, 0.0)
    prior = GaussianPosterior.prior(2)
    with pytest.raises(BanditError, match="discount"):
        prior.discounted(0.0, prior)
    with pytest.raises(BanditError, match="dimensions"):
        prior.discounted(0.5, GaussianPosterior.prior(3))
