"""The report finds a planted signal, finds nothing where there is none, and counts as it says."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.selector.assessment.baselines import BASELINES, permuted_signals, signal_stump
from simmerge_ray.selector.assessment.bench import NoiseSets
from simmerge_ray.selector.assessment.crossval import crossval_report
from simmerge_ray.selector.data.scoring import Scoring, option_utilities, shares_of, units_of
from simmerge_ray.selector.data.splits import base_folds, pairs_of, random_pair_folds
from tests.unit.selector.made_up import ARMS, planted

FAST = TrainConfig(model="ridge", num_members=2, num_epochs=60, num_trees=8)


@pytest.fixture(scope="module")
def report():
    return crossval_report(planted(8), FAST)


@pytest.mark.slow
def test_a_planted_signal_is_found_and_lost_when_permuted(report):
    figures = report["policies"]["per_merge"]["policies"]
    for name in ("selector", "selector, safe", "single-signal stump"):
        assert figures[name]["gain"] > 0.1 and figures[name]["gain_interval"][0] > 0, name
    assert all(figures[name]["gain"] > 0 for name in ("mlp", "knn", "forest"))
    low, high = figures["signals permuted"]["gain_interval"]
    assert low < 0 < high or abs(figures["signals permuted"]["gain"]) < 0.05
    assert figures["single-checkpoint features"]["gain"] < 0.1
    assert figures["selector"]["in_noise_set"] > report["policies"]["per_merge"]["majority_in_noise_set"]
    assert figures["selector"]["mean_regret"] < figures["best fixed"]["mean_regret"]
    assert figures["selector"]["worst_decile_regret"] >= figures["selector"]["mean_regret"]


def test_the_report_has_all_policies_or_says_why_not(report):
    expected = {"selector", "selector, safe", "mlp", "knn", "forest", "signals permuted", "parents' utilities"}
    expected |= {"single-checkpoint features", *BASELINES} - {"scale-matched linear"}
    for objective in ("per_merge", "per_context"):
        assert set(report["policies"][objective]["policies"]) == expected
        assert report[objective]["best_fixed"] == report["policies"][objective]["policies"]["best fixed"]["gap_closed"]
    assert "was not measured" in report["missing"]["scale-matched linear"]
    assert report["policies"]["per_merge"]["policies"]["uniform"]["num_units"] == 28
    assert report["policies"]["per_context"]["policies"]["uniform"]["num_units"] == 56
    accuracy = report["policies"]["per_merge"]["arm_accuracy"]
    assert set(accuracy) == set(ARMS) and accuracy["linear"]["accuracy"] > accuracy["linear"]["base_rate"]
    json.dumps(report, allow_nan=False)


def test_intervals_cover_about_their_level(report):
    for level, found in report["intervals"].items():
        assert abs(found["coverage"] - float(level)) < 0.12
    widths = [found["half_width"] for found in report["intervals"].values()]
    assert widths == sorted(widths)
    assert report["abstained"] < 0.2


def test_the_best_parent_is_an_option_and_closes_the_gap_of_its_task(report):
    assert report["policies"]["per_context"]["policies"]["better parent"]["gap_closed"] == pytest.approx(1.0)


def test_other_splits_are_reported_by_name():
    dataset = planted(6)
    folds = random_pair_folds(pairs_of(dataset.contexts), 3, 0)
    found = crossval_report(dataset, FAST, folds=folds, split="random pair")
    assert found["split"] == "random pair" and found["per_merge"]["gain"] > 0
    base_of = {f"c{i}": "ab"[i // 3] for i in range(6)}
    same = [row for row, pair in enumerate(pairs_of(dataset.contexts)) if base_of[pair[0]] == base_of[pair[1]]]
    inside = dataset.subset(same)
    # Three pairs, six contexts a base: too few to train on, and said.
    assert "too few" in crossval_report(inside, FAST, folds=base_folds(pairs_of(inside.contexts), base_of))["reason"]


def test_ties_are_split_and_one_arm_serves_the_merge():
    contexts = planted(3).contexts
    scores = np.zeros((6, 5))
    scores[:, 3:] = -np.inf
    np.testing.assert_allclose(shares_of(scores, units_of(contexts, True))[0], [1 / 3] * 3 + [0, 0])
    scores[0, 0], scores[1, 2] = 0.5, 1.0
    np.testing.assert_array_equal(shares_of(scores, units_of(contexts, True))[:2, 2], [1, 1])
    np.testing.assert_array_equal(shares_of(scores, units_of(contexts, False))[:2, 0], [1, 0])
    scores[:2] = np.nan
    assert np.isnan(shares_of(scores, units_of(contexts, True))[:2]).all()


def test_the_noise_set_holds_the_best_arm_and_its_equals():
    contexts = list(planted(3, num_items=400).contexts)
    noise = NoiseSets.of(contexts, ARMS, units_of(contexts, True))
    assert noise.within[np.arange(3), noise.best].all()
    assert not noise.within[:, 1].any()  # 0.5 against 0.75 on 400 items: five standard errors
    np.testing.assert_allclose(noise.utilities[0], option_utilities(contexts, ARMS)[:2].mean(0))


def test_a_stump_learns_from_its_training_rows_alone():
    dataset = planted(10)
    scoring = Scoring.of(dataset.contexts, dataset.arms)
    scores = signal_stump(dataset, scoring, range(60), range(60, 90))
    truth = np.where(dataset.features[60:, 0, -1] > 0, 0, 2)
    assert (scores.argmax(1) == truth).mean() > 0.75
    blinded = dataset.utilities.copy()
    blinded[60:] = 0
    blind = dataclasses.replace(dataset, utilities=blinded)
    np.testing.assert_array_equal(scores, signal_stump(blind, scoring, range(60), range(60, 90)))


def test_permuted_signals_keep_rows_together_and_the_tested_ones_as_they_are():
    dataset = planted(6)
    permuted = permuted_signals(dataset, range(20), 0)
    np.testing.assert_array_equal(permuted.features[20:], dataset.features[20:])
    assert not np.array_equal(permuted.features[:20], dataset.features[:20])
    np.testing.assert_array_equal(np.sort(permuted.features[:20], axis=0), np.sort(dataset.features[:20], axis=0))
    first = [row for row in range(20) if np.array_equal(dataset.features[row], permuted.features[0])]
    assert np.array_equal(permuted.features[1], dataset.features[first[0] + 1])
