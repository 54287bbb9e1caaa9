"""The selector learns what can be learned, survives its file, and refuses what does not fit."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import LabelError, SelectorError
from simmerge_ray.search.headroom import Context
from simmerge_ray.selector.assessment.crossval import crossval_report, predict_unseen
from simmerge_ray.selector.assessment.folds import CrossValidation
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.scoring import Scoring
from simmerge_ray.selector.models.model import read_selector
from simmerge_ray.selector.models.train import train_selector

ARMS = ("linear", "nuslerp", "ties")
FAST = TrainConfig(num_members=3, num_epochs=150)


def made_up_dataset(num_checkpoints: int = 6, learnable: bool = True, seed: int = 0) -> SelectionDataset:
    """Contexts whose best arm is the sign of a feature (or nothing); parents clearly differ on the task."""
    generator = np.random.default_rng(seed)
    contexts, features, utilities = [], [], []
    names = [f"c{i}" for i in range(num_checkpoints)]
    for i, left in enumerate(names):
        for right in names[i + 1 :]:
            for task in ("s", "t"):
                x = generator.normal(size=4)
                best = (0 if x[0] > 0 else 2) if learnable else int(generator.integers(3))
                rates = [0.4, 0.5, 0.4]
                rates[best] = 0.75
                arms = {
                    arm: (generator.random(100) < rate).astype(float) for arm, rate in zip(ARMS, rates, strict=True)
                }
                parents = [(generator.random(100) < rate).astype(float) for rate in (0.9, 0.1)]
                contexts.append(Context(left, right, task, arms, *parents))
                features.append([x, x])
                utilities.append([arms[arm].mean() for arm in ARMS])
    columns = ("loss_left", "loss_right", "entropy_left", "entropy_right")
    return SelectionDataset(tuple(contexts), ARMS, columns, np.array(features), np.array(utilities))


@pytest.mark.slow
def test_it_learns_a_rule_that_generalises_to_unseen_checkpoints():
    dataset = made_up_dataset()
    scoring = Scoring.of(dataset.contexts, ARMS)
    best_fixed = [ARMS.index(arm) for arm in CrossValidation.of(dataset, FAST, None).best_fixed()]
    picks = (predict_unseen(dataset, FAST).argmax(1), np.array(best_fixed))
    learned, fixed = (float(scoring.headline(scoring.taken(np.eye(5)[columns]))) for columns in picks)
    assert learned > fixed + 0.1
    report = crossval_report(dataset, FAST)
    assert report["per_context"]["gain_interval"][0] > 0
    assert report["per_context"]["selector"] == pytest.approx(learned)
    assert report["per_context"]["uniform"] == pytest.approx(scoring.fixed()[: len(ARMS)].mean())
    assert report["per_context"]["oracle"] > report["per_context"]["uniform"]
    json.dumps(report, allow_nan=False)


@pytest.mark.slow
def test_there_is_nothing_to_gain_where_there_is_no_rule():
    dataset = made_up_dataset(learnable=False)
    report = crossval_report(dataset, FAST)
    low, high = report["per_context"]["gain_interval"]
    assert low < 0.1 and report["per_context"]["selector"] < report["per_context"]["oracle"]


def test_too_few_labels_for_the_folds_are_said_and_do_not_stop_the_training():
    report = crossval_report(made_up_dataset(4), FAST)
    assert "too few to train on" in report["reason"] and "per_merge" not in report


def test_training_is_seeded_and_the_seed_matters():
    dataset = made_up_dataset(4)
    a, b = (train_selector(dataset, FAST).predict(dataset.features)[0] for _ in range(2))
    np.testing.assert_array_equal(a, b)
    other = train_selector(dataset, FAST.model_copy(update={"seed": 1})).predict(dataset.features)[0]
    assert not np.allclose(a, other)


def test_the_order_of_a_pair_does_not_change_its_prediction():
    dataset = made_up_dataset(4)
    features = dataset.features + np.random.default_rng(0).normal(size=dataset.features.shape)
    selector = train_selector(dataclasses.replace(dataset, features=features), FAST)
    for one, two in zip(selector.predict(features), selector.predict(features[:, ::-1]), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)


def test_contrasts_of_a_network_sum_to_zero():
    dataset = made_up_dataset(4)
    network = train_selector(dataset, FAST).fitted.predictor.members[0]
    inputs = np.random.default_rng(0).normal(size=(7, 4))
    level = network.encode(inputs) @ network.level[0] + network.level[1]
    np.testing.assert_allclose(network.utilities(inputs).mean(1, keepdims=True), level, rtol=1e-9)


def test_the_artifact_predicts_the_same_and_holds_no_pickle(tmp_path):
    dataset = made_up_dataset(4)
    selector = train_selector(dataset, FAST)
    selector.write(tmp_path / "selector")
    again = read_selector(tmp_path / "selector")
    for one, two in zip(selector.predict(dataset.features), again.predict(dataset.features), strict=True):
        np.testing.assert_array_equal(one, two)
    assert (again.arms, again.columns, again.best_fixed) == (selector.arms, selector.columns, selector.best_fixed)
    assert sorted(path.name for path in (tmp_path / "selector").iterdir()) == ["selector.json", "selector.safetensors"]
    assert again.provenance["num_contexts"] == len(dataset.contexts)


def test_damaged_missing_and_other_schema_artifacts_say_what_differs(tmp_path):
    with pytest.raises(SelectorError, match="simmerge train"):
        read_selector(tmp_path)
    train_selector(made_up_dataset(4), FAST).write(tmp_path / "good")
    for change, message in (
        ({"schema": 99}, "schema is 99"),
        ({"feature_schema": 0}, "feature_schema is 0"),
        ({"model": "oracle"}, "model is 'oracle'"),
        ({"model": ["mlp"]}, "model is"),
        ({"provenance": {"checkpoints": None}}, "damaged"),
        ({"arms": ["linear"]}, "damaged"),
        ({"best_fixed": None, "override": {}}, "damaged"),
        ({"encoding": {"kind": "onehot"}}, "damaged"),
        ({"schema": 1}, "train it again"),
    ):
        bad = tmp_path / "bad"
        shutil.copytree(tmp_path / "good", bad, dirs_exist_ok=True)
        content = json.loads((bad / "selector.json").read_text())
        (bad / "selector.json").write_text(json.dumps(content | change))
        with pytest.raises(SelectorError, match=message):
            read_selector(bad)
    (bad / "selector.json").write_text("{")
    with pytest.raises(SelectorError, match="not JSON"):
        read_selector(bad)


def test_too_few_labels_are_refused():
    with pytest.raises(LabelError, match="too few to train on"):
        train_selector(made_up_dataset().subset(range(3)), FAST)
