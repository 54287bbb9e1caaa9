"""Learning from rewards of single arms, beside contexts that have all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import SelectorError
from simmerge_ray.selector.data.rewards import RewardedMerge, rewards_digest, single_arms, without
from simmerge_ray.selector.data.splits import checkpoint_folds, pairs_of
from simmerge_ray.selector.models.train import fit_models, train_selector
from tests.unit.selector.made_up import ARMS, planted

CONFIG = TrainConfig(num_epochs=150, num_members=2, hidden_sizes=(16,), num_folds=4)


def reward(arm: str, utility: float, features: np.ndarray, members: tuple[str, ...] = ("x", "y")) -> RewardedMerge:
    tasks = tuple(f"t{number}" for number in range(len(features)))
    return RewardedMerge(members, tasks, arm, utility, features)


def tensors(model) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in model.predictor.tensors().items()}


def test_rewards_move_the_arm_that_was_observed_and_only_in_their_region():
    dataset = planted()
    far = np.full((1, 2, 6), 6.0)  # a region that no context is near
    generator = np.random.default_rng(0)
    rewards = [
        reward(arm, utility, far + generator.normal(scale=0.3, size=far.shape), (f"x{n}", "y"))
        for n in range(20)
        for arm, utility in (("linear", 0.1), ("nuslerp", 0.9), ("ties", 0.1))
    ]
    before, after = (train_selector(dataset, CONFIG, rewards=told) for told in ((), rewards))
    assert ARMS[after.predict(far)[0][0].argmax()] == "nuslerp" != ARMS[before.predict(far)[0][0].argmax()]
    assert after.predict(far)[0][0, 1] > 0.6
    here = [selector.predict(dataset.features)[0] for selector in (before, after)]
    assert (here[0].argmax(1) == here[1].argmax(1)).mean() > 0.9
    assert np.abs(here[0] - here[1]).mean() < 0.05
    assert after.distances(far) <= after.novelty.limit < before.distances(far)  # it knows such merges now,
    assert after.novelty.limit == before.novelty.limit  # and no others because of them
    assert after.provenance["num_rewards"] == 60
    assert after.provenance["data_digest"] != before.provenance["data_digest"]


def test_a_reward_of_several_tasks_is_fitted_in_their_mean():
    dataset = planted()
    generator = np.random.default_rng(1)
    tasks = np.array([[[3.0] * 6] * 2, [[-3.0] * 6] * 2])
    rewards = [
        reward(arm, 0.2, tasks + generator.normal(scale=0.1, size=tasks.shape), (f"x{n}", "y"))
        for n in range(30)
        for arm in ARMS
    ]
    selector = train_selector(dataset, CONFIG, rewards=rewards)
    predicted = selector.predict(tasks)[0]
    assert predicted.mean(0) == pytest.approx([0.2] * 3, abs=0.08)


def test_tasks_and_orders_are_padded_without_a_trace():
    """A merge of one task is the same row whether the longest has one task or three."""
    short, long = np.full((1, 2, 4), 0.5), np.zeros((3, 2, 4))
    alone = single_arms([reward("ties", 0.5, short)], ARMS, [short])
    beside = single_arms([reward("ties", 0.5, short), reward("linear", 0.5, long)], ARMS, [short, long])
    assert beside.inputs.shape == (2, 2, 3, 4) and beside.shares[1].tolist() == [1 / 3] * 3
    assert np.array_equal(beside.inputs[0, :, :1], alone.inputs[0]) and beside.shares[0].tolist() == [1.0, 0.0, 0.0]
    assert single_arms([], ARMS, []) is None


def test_a_bootstrap_keeps_the_rewards_of_a_merge_together():
    features = np.zeros((1, 2, 4))
    told = [reward("ties", 0.5, features, members) for members in (("a", "b"), ("c", "d"), ("b", "a"), ("c", "e"))]
    made = single_arms(told, ARMS, [features] * 4)
    for seed in range(20):
        count = made.drawn_counts(np.random.default_rng(seed))
        assert count[0] == count[2] and count[[0, 1, 3]].sum() == 3


def test_models_know_no_reward_of_a_checkpoint_that_they_leave_out():
    dataset = planted()
    folds = checkpoint_folds(pairs_of(dataset.contexts), 4, 0)
    parts = [fold.training for fold in folds]
    features = np.zeros((1, 2, 6))
    told = [reward("ties", 0.5, features, ("c0", "x")), reward("linear", 0.5, features, ("x", "y"))]
    changed = [replace(told[0], utility=1.0), told[1]]
    for fold, one, two in zip(
        folds, *(fit_models(dataset, parts, CONFIG, rewards=r) for r in (told, changed)), strict=True
    ):
        left_out = "c0" in fold.name.split(", ")
        assert (tensors(one) == tensors(two)) == left_out
    assert without(told, {"c0"}) == told[1:] and without(told, set()) == told


def test_the_order_of_contexts_plays_no_part_and_the_digest_tells_rewards_apart():
    features = np.zeros((1, 2, 6))
    one, two = reward("ties", 0.5, features), reward("linear", 0.5, features)
    assert rewards_digest([one]) != rewards_digest([two]) != rewards_digest([replace(two, features=features + 1)])
    assert rewards_digest([one, two]) == rewards_digest([replace(one), replace(two)])


def test_only_networks_learn_from_single_arms():
    with pytest.raises(SelectorError, match="a ridge selector cannot learn from rewards"):
        train_selector(planted(), TrainConfig(model="ridge"), rewards=[reward("ties", 0.5, np.zeros((1, 2, 6)))])
