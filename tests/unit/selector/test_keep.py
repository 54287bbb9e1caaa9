"""Keeping a parent is an arm like another, but for what a swap of the pair does to it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import LabelError, SelectorError
from simmerge_ray.plans.keeping import KEEP, KEEP_ARMS
from simmerge_ray.search.headroom import Context
from simmerge_ray.selector.assessment.crossval import crossval_report
from simmerge_ray.selector.data.dataset import SelectionDataset, with_keep
from simmerge_ray.selector.data.orders import by_order, heads_of, of_arms
from simmerge_ray.selector.data.rewards import RewardedMerge
from simmerge_ray.selector.data.scoring import Scoring, keeping_no_parent, option_scores, options_of
from simmerge_ray.selector.models.model import read_selector
from simmerge_ray.selector.models.train import train_selector
from tests.unit.selector.made_up import ARMS, COLUMNS, planted

FAST = TrainConfig(num_members=2, num_epochs=150)


@pytest.fixture(params=["mlp", "ridge", "knn", "forest"])
def config(request):
    return TrainConfig(model=request.param, num_members=2, num_epochs=200, num_trees=20)


def with_better_parents(num_checkpoints: int = 7, seed: int = 0) -> SelectionDataset:
    """Pairs of which one parent is far better than every merge, the one with the lower loss; the arms hardly differ."""
    generator = np.random.default_rng(seed)
    loss = dict(zip((f"c{i}" for i in range(num_checkpoints)), generator.permutation(num_checkpoints), strict=True))
    contexts, features, utilities = [], [], []
    for left in loss:
        for right in (name for name in loss if name > left):
            for task in ("s", "t"):
                better = loss[left] < loss[right]
                arms = {arm: (generator.random(80) < 0.5).astype(float) for arm in ARMS}
                left_items, right_items = (
                    (generator.random(80) < (0.9 if side else 0.2)).astype(float) for side in (better, not better)
                )
                contexts.append(Context(left, right, task, arms, left_items, right_items))
                values = np.array([loss[left], loss[right], *generator.normal(size=4)])
                features.append([values, values[[1, 0, 3, 2, 4, 5]]])
                utilities.append([arms[arm].mean() for arm in ARMS])
    return with_keep(SelectionDataset(tuple(contexts), ARMS, COLUMNS, np.array(features), np.array(utilities)))


def swapped(dataset: SelectionDataset, rows: np.ndarray) -> SelectionDataset:
    """The same pairs, those among the rows with left and right exchanged."""
    contexts = [
        dataclasses.replace(
            one, left=one.right, right=one.left, left_items=one.right_items, right_items=one.left_items
        ) if turn else one
        for one, turn in zip(dataset.contexts, rows, strict=True)
    ]  # fmt: skip
    features, utilities = dataset.features.copy(), dataset.utilities.copy()
    features[rows] = features[rows][:, ::-1]
    utilities[rows, -2:] = utilities[rows][:, [-1, -2]]
    return dataclasses.replace(dataset, contexts=tuple(contexts), features=features, utilities=utilities)


@given(seed=st.integers(0, 2**32 - 1), merges=st.integers(1, 4), keep=st.booleans())
def test_the_arms_of_both_orders_are_what_they_were_made_of(seed, merges, keep):
    values = np.random.default_rng(seed).normal(size=(5, merges + 2 * keep))
    heads = by_order(values, keep)
    assert heads.shape == (5, 2, len(heads_of((*"abcd"[:merges], *(KEEP_ARMS if keep else ())))))
    np.testing.assert_array_equal(of_arms(heads, keep), values)
    # Swapping the pair swaps the kept parents, and nothing else.
    other = of_arms(heads[:, ::-1], keep)
    np.testing.assert_array_equal(other, values[:, [*range(merges), *((merges + 1, merges) if keep else ())]])


def test_swapping_a_pair_swaps_the_predictions_for_its_parents(config):
    dataset = with_better_parents(5)
    selector = train_selector(dataset, config)
    for one, two in zip(selector.predict(dataset.features), selector.predict(dataset.features[:, ::-1]), strict=True):
        np.testing.assert_allclose(two, one[:, [0, 1, 2, 4, 3]], rtol=1e-12)


def test_which_parent_is_called_left_in_the_labels_changes_nothing(config):
    dataset = with_better_parents(5)
    turned = np.random.default_rng(3).random(len(dataset.contexts)) < 0.5
    turned[1::2] = turned[::2]  # both tasks of a pair
    other = swapped(dataset, turned)
    one, two = (train_selector(each, config).predict(dataset.features)[0] for each in (dataset, other))
    if config.model == "forest":  # it draws rows by their place
        assert np.abs(two - one).mean() < 0.05
    else:  # sums over the rows are in another order
        np.testing.assert_allclose(two, one, atol=2e-3)


def test_it_learns_which_parent_is_better_and_the_safe_policy_keeps_it():
    dataset = with_better_parents()
    selector = train_selector(dataset, FAST)
    assert selector.best_fixed in ARMS and not selector.override.never
    for row in range(0, len(dataset.contexts), 2):
        better = KEEP_ARMS[int(dataset.features[row, 0, 0] > dataset.features[row, 0, 1])]
        choice = selector.choose(dataset.features[row : row + 2], pair=None)
        assert choice.arm == better and choice.overrode
        one = dataset.contexts[row]
        named = selector.choose(dataset.features[row : row + 2], pair=(one.left, one.right))
        assert named.arm == f"keep({one.left if better == KEEP_ARMS[0] else one.right})"
        assert "left" not in named.reason and named.arm not in ARMS


def test_the_level_means_what_it_meant_without_parents(config):
    dataset = planted(5)
    plain, kept = (train_selector(one, config) for one in (dataset, with_keep(dataset)))
    assert kept.reference == plain.reference == ARMS and kept.arms == (*ARMS, *KEEP_ARMS)
    one, other = (selector.predict(dataset.features)[0] for selector in (plain, kept))
    if config.model == "mlp":  # its heads share the encoder; but contrasts sum to zero over the operators alone
        for network in kept.fitted.predictor.members:
            np.testing.assert_allclose(network.contrast[0][:, :3].sum(1), 0.0, atol=1e-12)
    else:
        np.testing.assert_allclose(other[:, :3], one, atol=1e-9)


def test_an_artifact_says_whether_a_parent_may_be_kept(config, tmp_path):
    dataset = with_better_parents(5)
    selector = train_selector(dataset, config)
    selector.write(tmp_path / "selector")
    again = read_selector(tmp_path / "selector")
    assert again.arms == selector.arms and again.fitted.keep
    np.testing.assert_array_equal(again.predict(dataset.features)[0], selector.predict(dataset.features)[0])
    description = json.loads((tmp_path / "selector" / "selector.json").read_text())
    for arms in ([*ARMS, "keep(left)"], [*ARMS, "keep(right)", "keep(left)"], ["keep(left)", "keep(right)", *ARMS]):
        (tmp_path / "selector" / "selector.json").write_text(json.dumps(description | {"arms": arms}))
        with pytest.raises(SelectorError, match="damaged"):
            read_selector(tmp_path / "selector")


def test_a_parent_is_neither_a_reference_nor_the_best_fixed_arm():
    dataset = with_better_parents(5)
    with pytest.raises(LabelError, match="reference arm"):
        train_selector(dataset, FAST, reference=("linear", "keep(left)"))
    # Called left where it is better: one fixed arm would be better than all, by nothing but the names.
    turned = swapped(dataset, dataset.utilities[:, -1] > dataset.utilities[:, -2])
    scoring = Scoring.of(turned.contexts, turned.arms)
    assert scoring.fixed()[-2] > scoring.fixed()[:-2].max()
    assert turned.arms[scoring.best_fixed()] in ARMS


def test_options_are_the_same_with_and_without_parents_among_the_arms():
    dataset = planted(4)
    kept = with_keep(dataset)
    assert options_of(dataset.arms) == options_of(kept.arms) == kept.arms
    assert with_keep(kept) is kept
    for name in ("closed", "gap", "rows"):
        a, b = (getattr(Scoring.of(one.contexts, one.arms), name) for one in (dataset, kept))
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(option_scores(dataset.utilities, ARMS), keeping_no_parent(dataset.utilities))
    np.testing.assert_array_equal(option_scores(kept.utilities, kept.arms), kept.utilities)


def test_the_report_on_unseen_checkpoints_counts_the_kept_parents():
    report = crossval_report(with_better_parents(), FAST)
    figures = report["policies"]["per_merge"]["policies"]
    assert report["arms"] == [*ARMS, *KEEP_ARMS]
    assert figures["selector"]["gap_closed"] > 0.9 > figures["best fixed"]["gap_closed"]
    assert figures["selector"]["gain_interval"][0] > 0 and figures["selector, safe"]["gain_interval"][0] > 0
    assert figures["selector"]["mean_regret"] == pytest.approx(0.0, abs=0.02)
    assert all(one["mean_regret"] >= 0 for one in figures.values())  # a parent is an arm to be regretted
    assert report["per_merge"]["oracle"] >= figures["selector"]["gap_closed"] - 0.05


def test_a_reward_of_a_kept_parent_is_about_the_first_checkpoint():
    dataset = with_better_parents(5)
    better = dataset.utilities[:, -2:].argmax(1)
    rewards = []
    for row, context in enumerate(dataset.contexts):
        # As logged: the kept checkpoint first. Here always the worse one, with a utility that no label has.
        order = [1 - better[row], better[row]]
        pair = (context.left, context.right)
        members = tuple(pair[side] for side in order)
        rewards += [RewardedMerge(members, (context.task,), KEEP, 0.7, dataset.features[row : row + 1, order])] * 10
    plain, told = (train_selector(dataset, FAST, rewards=given).predict(dataset.features)[0] for given in ((), rewards))
    rows = np.arange(len(better))
    worse, best = (np.abs(told - plain)[rows, 3 + side].mean() for side in (1 - better, better))
    assert worse > 0.1 and best < worse / 2
