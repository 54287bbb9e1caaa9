"""The same observations in the libraries of others: river, bayesianbandits, coba.

Known of them: bayesianbandits keeps only the upper triangle of its precision; coba has no prior but the identity, and
its v is the variance of the draws, ours squared.
"""

from __future__ import annotations

import numpy as np
import pytest

from simmerge_ray.service.bandit.posterior import GaussianPosterior

DIMENSIONS, COUNT = 6, 60


def seen() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(7)
    return generator.normal(size=(COUNT, DIMENSIONS)), generator.normal(size=COUNT)


def posterior(ridge: float) -> GaussianPosterior:
    return GaussianPosterior.prior(DIMENSIONS, ridge).fold(zip(*seen(), strict=True))


def test_river():
    from river import linear_model

    model = linear_model.BayesianLinearRegression(alpha=2.0, beta=1.0)
    for z, reward in zip(*seen(), strict=True):
        model.learn_one(dict(enumerate(z)), reward)
    ours = posterior(2.0)
    for z in np.random.default_rng(1).normal(size=(20, DIMENSIONS)):
        theirs = model.predict_one(dict(enumerate(z)), with_dist=True)
        mean, spread = ours.marginal(z)
        assert mean == pytest.approx(theirs.mu, rel=1e-12, abs=1e-12)
        # Theirs is the distribution of a reward: the noise, of variance 1, comes on top.
        assert spread**2 == pytest.approx(theirs.sigma**2 - 1.0, rel=1e-11)


def test_bayesianbandits():
    from bayesianbandits import NormalRegressor

    model = NormalRegressor(alpha=2.0, beta=1.0, random_state=0)
    for z, reward in zip(*seen(), strict=True):
        model.partial_fit(z[None], np.array([reward]))
    ours = posterior(2.0)
    np.testing.assert_allclose(ours.mean, model.coef_, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.triu(ours.precision), np.triu(model.cov_inv_), rtol=1e-12, atol=1e-12)
    z = np.ones(DIMENSIONS)
    draws = np.array([model.sample(z[None], size=200_000)]).ravel()
    mean, spread = ours.marginal(z)
    assert draws.mean() == pytest.approx(mean, abs=5 * spread / np.sqrt(len(draws)))
    assert draws.std() == pytest.approx(spread, rel=0.01)


def test_coba():
    from coba.learners import LinTSLearner

    model = LinTSLearner(v=1.0, features=["a"])
    for z, reward in zip(*seen(), strict=True):
        model.learn(None, tuple(z), reward, 1.0)
    ours = posterior(1.0)
    np.testing.assert_allclose(ours.mean, model._mu_hat, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.linalg.inv(ours.precision), model._B_inv, rtol=1e-11, atol=1e-13)
