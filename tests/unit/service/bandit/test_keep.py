"""Keeping a parent: one posterior for both sides of a pair, two choices with propensities of their own."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import BanditError
from simmerge_ray.plans.keeping import KEEP
from simmerge_ray.selector.data.splits import checkpoint_folds, pairs_of
from simmerge_ray.selector.models.train import fit_models
from simmerge_ray.service.bandit.policy import NeuralLinearTS, Noise, SafeRule, num_choices
from simmerge_ray.service.bandit.posterior import GaussianPosterior
from simmerge_ray.service.bandit.warm_start import merges_of, start_from_labels, warm_posteriors
from tests.unit.selector.test_keep import swapped, with_better_parents

Z = np.array([1.0, 0.5])
KEPT = {"keep(a)": np.array([1.0, 0.9]), "keep(b)": np.array([1.0, -0.2])}
CONFIG = TrainConfig(num_members=2, num_epochs=120, num_folds=4)


def policy(safe: SafeRule | None = None, floor: float = 0.0) -> NeuralLinearTS:
    generator = np.random.default_rng(0)
    posteriors = {}
    for number, arm in enumerate(("linear", "ties", KEEP)):
        seen = [(np.array([1.0, x]), 0.1 * number * x + 0.1 * generator.normal()) for x in generator.normal(size=12)]
        posteriors[arm] = GaussianPosterior.prior(2).fold(seen)
    return NeuralLinearTS(posteriors, Noise(0.05), safe, floor)


@pytest.mark.parametrize(
    ("safe", "floor"), [(None, 0.0), (SafeRule("linear", 0.05), 0.05), (SafeRule("ties", math.inf), 0.05)]
)
def test_each_parent_comes_as_often_as_its_propensity_says(safe, floor):
    tried, count = policy(safe, floor), 6000
    found = tried.suggest(Z, "x", kept=KEPT)
    assert found.arms == ("linear", "ties", "keep(a)", "keep(b)")
    assert found.propensities.sum() == pytest.approx(1.0, abs=1e-10) and (found.propensities >= floor - 1e-12).all()
    counts = Counter(tried.suggest(Z, str(number), kept=KEPT).arm for number in range(count))
    for arm, expected in zip(found.arms, found.propensities, strict=True):
        assert counts[arm] / count == pytest.approx(expected, abs=4.5 * math.sqrt(0.25 / count))


def test_swapping_the_pair_changes_nothing_but_the_order():
    one, other = (policy().suggest(Z, "d", kept=dict(kept)) for kept in (KEPT.items(), reversed(KEPT.items())))
    assert one.arm == other.arm
    for values in ("propensities", "means", "draws"):
        first, second = (dict(zip(found.arms, getattr(found, values), strict=True)) for found in (one, other))
        assert first == pytest.approx(second, abs=1e-12)


def test_each_side_has_its_own_context_and_both_learn_from_either():
    tried = policy()
    means = dict(zip(*(getattr(tried.suggest(Z, "d", kept=KEPT), name) for name in ("arms", "means")), strict=True))
    for name, z in KEPT.items():
        assert means[name] == pytest.approx(tried.posterior(KEEP).marginal(z)[0])
    tried.update([(KEEP, KEPT["keep(a)"], 1.0)] * 20)
    after = tried.suggest(Z, "d", explore=False, kept=KEPT)
    assert after.arm == "keep(a)" and after.propensities.tolist() == [0.0, 0.0, 1.0, 0.0]
    assert after.means[3] != pytest.approx(means["keep(b)"])  # the bias is shared


def test_without_contexts_of_the_parents_none_is_kept():
    tried = policy()
    assert tried.suggest(Z, "d").arms == ("linear", "ties")
    plain = NeuralLinearTS({"linear": GaussianPosterior.prior(2)}, Noise(1.0))
    assert plain.suggest(Z, "d", kept=KEPT).arms == ("linear",)  # a selector without keep
    assert num_choices(tried.arms) == 4 and num_choices(plain.arms) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: policy(SafeRule(KEEP, 0.1)), "fixed arm 'keep'"),
        (lambda: policy(floor=0.3), r"with 4 arms it must be in \[0, 1/4\]"),
        (lambda: policy().suggest(Z, "d", among=["keep(c)"], kept=KEPT), r"keep\(c\)"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(BanditError, match=message):
        make()


def test_labels_of_both_parents_start_one_posterior_whichever_is_called_left():
    dataset = with_better_parents(6)
    (model,) = fit_models(dataset, [range(len(dataset.contexts))], CONFIG)
    turned = np.zeros(len(dataset.contexts), bool)
    turned[:10] = True
    starts = []
    for one in (dataset, swapped(dataset, turned)):
        merges = merges_of(one, model, range(len(one.contexts)))
        posteriors, noise = warm_posteriors(merges, one.arms, merges.level)
        assert tuple(posteriors) == ("linear", "nuslerp", "ties", KEEP)
        assert posteriors[KEEP].count == 2 * posteriors["linear"].count == 2 * len(merges.rows)
        starts.append((posteriors, noise, merges))
    (first, noise, merges), (second, other, _) = starts
    assert other.variance == pytest.approx(noise.variance)
    np.testing.assert_allclose(second[KEEP].precision, first[KEEP].precision, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(second[KEEP].mean, first[KEEP].mean, rtol=1e-5, atol=1e-8)
    # What it says of a parent is what the labels say: the better one is kept.
    folds = checkpoint_folds(pairs_of(dataset.contexts), 3, 0)
    warm, noise = start_from_labels(dataset, model, folds, CONFIG)
    known = NeuralLinearTS(warm, noise)
    right = 0
    for row, z in enumerate(merges.z):
        kept = dict(zip(("keep(left)", "keep(right)"), merges.z_by_order[row], strict=True))
        right += known.suggest(z, "d", explore=False, kept=kept).arm == list(kept)[merges.utility[row, -2:].argmax()]
    assert right >= 0.9 * len(merges.rows)
