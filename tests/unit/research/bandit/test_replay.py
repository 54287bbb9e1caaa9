from __future__ import annotations

import numpy as np
import pytest

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import BanditError
from simmerge_ray.research.bandit.replay import (
    Bandit,
    Highest,
    Rounds,
    always,
    expected_uniform,
    obtained,
    oracle,
    regret,
    replay,
    rounds_of,
)
from simmerge_ray.selector.data.scoring import Scoring
from simmerge_ray.selector.data.splits import checkpoint_folds, pairs_of
from simmerge_ray.selector.models.train import fit_models
from simmerge_ray.service.bandit.policy import NeuralLinearTS, Noise
from simmerge_ray.service.bandit.posterior import GaussianPosterior
from simmerge_ray.service.bandit.warm_start import (
    contexts_of,
    merge_values,
    merges_of,
    out_of_fold_level,
    warm_posteriors,
)
from tests.unit.selector.made_up import ARMS, planted

CONFIG = TrainConfig(num_members=2, num_epochs=100)


def linear_rounds(count: int = 200, seed: int = 0, noise: float = 0.05) -> Rounds:
    """The sign of the context decides between the first two arms; the third is always worse."""
    generator = np.random.default_rng(seed)
    z = np.column_stack([generator.choice([-1.0, 1.0], count), np.ones(count)])
    truth = np.column_stack([0.5 + 0.1 * z[:, 0], 0.5 - 0.1 * z[:, 0], np.full(count, 0.3)])
    reward = truth + noise * generator.normal(size=truth.shape)
    known = np.ones(truth.shape, dtype=bool)
    return Rounds(("a", "b", "c"), z, np.full(count, 0.4), reward, truth, known, np.full(count, 0.5))


def cold(arms: tuple[str, ...], dimensions: int, variance: float = 0.01) -> NeuralLinearTS:
    return NeuralLinearTS({arm: GaussianPosterior.prior(dimensions, 0.1) for arm in arms}, Noise(variance))


def test_thompson_sampling_learns_what_a_fixed_arm_cannot():
    rounds = linear_rounds()
    best = replay(Highest(rounds.truth), rounds)
    learned = obtained(replay(Bandit(cold(rounds.arms, 2), "k"), rounds), rounds)
    fixed = obtained(replay(always(0, rounds), rounds), rounds)
    assert obtained(best, rounds).mean() == pytest.approx(0.6)
    assert learned[50:].mean() > 0.59 > 0.52 > fixed.mean()
    assert expected_uniform(rounds).mean() == pytest.approx((0.5 + 0.5 + 0.3) / 3)
    total = np.cumsum(regret(learned, rounds))
    assert total[-1] < 0.3 * np.cumsum(regret(expected_uniform(rounds), rounds))[-1]


def test_the_oracle_chooses_on_one_half_and_is_scored_on_the_other():
    generator = np.random.default_rng(0)
    same = np.full((4000, 5), 0.5)
    halves = [same + 0.1 * generator.normal(size=same.shape) for _ in range(2)]
    rounds = Rounds(tuple("abcde"), np.ones((4000, 1)), same[:, 0], *halves, same > 0, same[:, 0])
    assert oracle(rounds).mean() == pytest.approx(0.5, abs=0.01)
    assert regret(oracle(rounds), rounds).sum() == 0.0


def test_delayed_rewards_are_learned_late_and_only_once():
    rounds = linear_rounds(12)
    policy = cold(rounds.arms, 2)
    replay(Bandit(policy, "k"), rounds, delay=4)
    assert sum(policy.posterior(arm).count for arm in rounds.arms) == 12 - 1 - 4
    at_once = cold(rounds.arms, 2)
    replay(Bandit(at_once, "k"), rounds)
    assert sum(at_once.posterior(arm).count for arm in rounds.arms) == 11


def test_an_arm_is_played_when_it_exists():
    rounds = linear_rounds(120)
    rounds.available[:60, 0] = False
    policy = cold(("b", "c"), 2)

    def arrive(number: int) -> None:
        if number == 60:
            policy.add_arm("a", GaussianPosterior.prior(2, 0.1))

    played = replay(Bandit(policy, "k"), rounds, on_round=arrive)
    assert 0 not in played[:60] and (played[90:] == 0).sum() > 8
    rounds.available[3] = False
    with pytest.raises(BanditError, match="no arm"):
        rounds.ordered(range(120))


def test_a_replay_refuses_an_arm_that_does_not_exist():
    rounds = linear_rounds(5)
    rounds.available[:, 2] = False
    assert (replay(always(2, rounds), rounds) == 0).all()

    class Wrong(Highest):
        def play(self, number: int, rounds: Rounds) -> int:
            return 2

    with pytest.raises(BanditError, match="'c'"):
        replay(Wrong(rounds.reward), rounds)


def test_the_same_key_gives_the_same_replay():
    rounds = linear_rounds(60)
    first, second = (replay(Bandit(cold(rounds.arms, 2), "k"), rounds) for _ in range(2))
    assert (first == second).all()
    assert (first != replay(Bandit(cold(rounds.arms, 2), "other"), rounds)).any()


def warm():
    dataset = planted(num_checkpoints=10)
    (model,) = fit_models(dataset, [range(len(dataset.contexts))], CONFIG)
    merges = merges_of(dataset, model, range(len(dataset.contexts)))
    folds = checkpoint_folds(pairs_of(dataset.contexts), 5, 0)
    return dataset, model, merges, out_of_fold_level(dataset, folds, CONFIG)


def test_context_and_level_make_the_selector_s_prediction():
    dataset, model, merges, _ = warm()
    encoded = contexts_of(model, dataset.features, [context.task for context in dataset.contexts])
    z, level = encoded.z, encoded.level
    assert z.shape[1] == CONFIG.num_members * CONFIG.hidden_sizes[-1] + 1 and (z[:, -1] == 1).all()
    np.testing.assert_allclose(encoded.z_by_order.mean(1), z, rtol=1e-12)
    # Contrasts sum to zero over all arms here, so the mean prediction is the level.
    np.testing.assert_allclose(model.predict(dataset.features)[0].mean(1), level, atol=1e-12)
    assert len(merges.rows) == 45 and all(len(rows) == 2 for rows in merges.rows)
    np.testing.assert_allclose(merges.level[0], level[list(merges.rows[0])].mean())


def test_a_warm_start_begins_where_a_cold_one_arrives():
    dataset, _, merges, level = warm()
    posteriors, noise = warm_posteriors(merges, ARMS, merge_values(level, merges))
    scoring = Scoring.of(dataset.contexts, dataset.arms)
    gaps = dict(zip(scoring.rows.tolist(), scoring.gap.tolist(), strict=True))
    rounds = rounds_of(dataset, merges.rows, merges.z, merges.level, gaps)
    assert rounds.reward.shape == (45, 3) and np.isfinite(rounds.gap).all()
    started = obtained(replay(Bandit(NeuralLinearTS(posteriors, noise), "k", explore=False), rounds), rounds)
    prior = GaussianPosterior.prior(merges.z.shape[1])
    untaught = NeuralLinearTS(dict.fromkeys(ARMS, prior), noise)
    from_nothing = obtained(replay(Bandit(untaught, "k"), rounds), rounds)
    assert started[:20].mean() > from_nothing[:20].mean() + 0.05
    swapped = rounds_of(dataset, merges.rows, merges.z, merges.level, gaps, first_half=False)
    assert (swapped.reward == rounds.truth).all()


def test_a_sibling_s_prior_counts_a_part_of_what_that_has_seen():
    _, _, merges, level = warm()
    posteriors, _ = warm_posteriors(merges, ARMS, merge_values(level, merges))
    prior = GaussianPosterior.prior(merges.z.shape[1])
    assert posteriors["ties"].discounted(0.1, prior).weight == pytest.approx(0.1 * posteriors["ties"].weight)


def test_what_cannot_start_is_refused():
    _, _, merges, _ = warm()
    with pytest.raises(BanditError, match="too few"):
        warm_posteriors(merges, ARMS, np.full(len(merges.rows), np.nan))
    dataset = planted()
    (ridge,) = fit_models(dataset, [range(len(dataset.contexts))], TrainConfig(model="ridge"))
    with pytest.raises(BanditError, match="ridge"):
        contexts_of(ridge, dataset.features, [context.task for context in dataset.contexts])
