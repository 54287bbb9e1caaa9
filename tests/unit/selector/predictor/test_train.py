"""The predictor: it learns what is planted, says what it does not know, and its artifact is the same predictor."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import LabelError, SelectorError
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import Recipe
from simmerge_ray.selector.predictor.model import read_predictor
from simmerge_ray.selector.predictor.signals import SingleValues
from simmerge_ray.selector.predictor.train import member_folds, row_metrics, train_predictor, unseen_utilities
from tests.unit.selector.predictor.made_up import rows_of_bases, singles_of

RIDGE = TrainConfig(model="ridge", num_folds=4)
SMALL = {
    "ridge": RIDGE,
    "forest": TrainConfig(model="forest", num_folds=4, num_trees=8),
    "mlp": TrainConfig(model="mlp", num_folds=4, num_members=2, num_epochs=80),
}


@pytest.fixture(scope="module")
def rows():
    return rows_of_bases()


@pytest.fixture(scope="module")
def predictor(rows):
    return train_predictor(rows, RIDGE)


@pytest.mark.parametrize("model", SMALL)
def test_it_learns_what_is_planted_for_checkpoints_it_has_not_seen(rows, model):
    found = unseen_utilities(rows, member_folds(rows, SMALL[model]), SMALL[model])
    assert row_metrics(rows, found)["r2"] > 0.9


def test_no_fold_trains_on_a_merge_of_what_it_tests(rows):
    folds = member_folds(rows, RIDGE)
    assert folds and {row for fold in folds for row in fold.tested} == set(range(len(rows.utility)))
    for fold in folds:
        left_out = set(fold.name.split(", "))
        for row in fold.training:
            assert not left_out & {f"{rows.bases[row]}/{name}" for name in rows.members[row]}
    for fold in rows.base_folds():
        assert {rows.bases[row] for row in fold.tested} == {fold.name}
        assert fold.name not in {rows.bases[row] for row in fold.training}


def test_operators_of_the_training_merges_change_nothing(rows, predictor):
    """The same signals and utilities under other names of operators and weights make the same predictor."""
    renamed = tuple(
        MergePlan(recipe=Recipe(make_arm("dare_ties"), plan.members, plan.recipe.weights)) for plan in rows.plans
    )
    other = train_predictor(replace(rows, plans=renamed), RIDGE)
    grid = rows.features[:40]
    assert np.allclose(predictor.fitted.utility(grid), other.fitted.utility(grid), rtol=0, atol=1e-9)


def test_the_order_of_rows_changes_nothing(rows, predictor):
    shuffled = rows.subset(np.random.default_rng(3).permutation(len(rows.utility)).tolist())
    other = train_predictor(shuffled, RIDGE)
    assert other.provenance == predictor.provenance
    assert (other.fitted.utility(rows.features) == predictor.fitted.utility(rows.features)).all()


def test_intervals_cover_checkpoints_that_were_not_seen(predictor):
    fresh = rows_of_bases(num_bases=1, seed=9)
    errors = np.abs(predictor.fitted.utility(fresh.features) - fresh.utility)
    for level, width in zip(predictor.intervals.levels, predictor.intervals.half_widths[:, 0], strict=True):
        # 120 rows: the share inside has a standard error of at most .046
        assert (errors <= width).mean() > level - 0.14
    assert (np.diff(predictor.intervals.half_widths[:, 0]) >= 0).all()


def test_predictions_by_task_with_interval_and_what_is_not_known(predictor):
    generator = np.random.default_rng(0)
    singles = singles_of(2, generator)
    retention = np.array([[0.9, 0.2], [0.5, 0.5]])
    found = predictor.predict(["t", "s"], retention, 2 * (1 - retention), singles)
    assert found.tasks == ("s", "t") and found.utility.shape == (2, 2)
    assert found.utility[0] == pytest.approx([0.26, 0.82], abs=0.05)
    assert found.known.all() and 0 < found.half_width < 0.1 and found.level == 0.9
    strange = SingleValues(singles.base_retention * 0, singles.base_nll + 40, singles.own_nll + 9)
    assert not predictor.predict(["t", "s"], retention * 0, retention * 0, strange).known.any()
    extreme = predictor.predict(["t", "s"], retention * 0, retention * 0 + 700, singles).utility
    assert ((extreme >= 0) & (extreme <= 1)).all()
    assert predictor.predict(["t", "s"], np.zeros((0, 2)), np.zeros((0, 2)), singles).utility.shape == (0, 2)


def test_signals_that_do_not_fit_are_refused(predictor):
    singles = singles_of(2, np.random.default_rng(0))
    for tasks, retention, level, message in (
        (["s"], np.ones((1, 2)), 0.9, "do not fit 1 owners"),
        (["s", "t"], np.ones((1, 3)), 0.9, "do not fit 2 owners"),
        (["s", "t"], np.full((1, 2), np.nan), 0.9, "not a finite number"),
        (["s", "t"], np.ones((1, 2)), 0.7, "no interval of level 0.7; known: 0.5"),
    ):
        with pytest.raises(SelectorError, match=message):
            predictor.predict(tasks, retention, np.ones_like(retention), singles, level)


@pytest.mark.parametrize("model", SMALL)
def test_the_artifact_is_the_same_predictor(rows, model, tmp_path):
    made = train_predictor(rows.subset(range(120)), SMALL[model])
    made.write(tmp_path / "p")
    read = read_predictor(tmp_path / "p")
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["predictor.json", "predictor.safetensors"]
    assert (read.fitted.utility(rows.features) == made.fitted.utility(rows.features)).all()
    assert (read.is_known(rows.features) == made.is_known(rows.features)).all()
    assert (read.intervals.half_widths == made.intervals.half_widths).all()
    assert read.provenance == json.loads(json.dumps(made.provenance))


def test_damaged_missing_and_other_schema_artifacts_say_what_differs(predictor, tmp_path):
    with pytest.raises(SelectorError, match="no predictor at .*predictor train"):
        read_predictor(tmp_path / "none")
    predictor.write(tmp_path / "p")
    description = json.loads((tmp_path / "p" / "predictor.json").read_text())
    for change, message in (
        ({"schema": 9}, "schema is 9, this version reads 1"),
        ({"columns": ["loss"]}, "its inputs are loss"),
        ({"model": "oracle"}, "damaged"),
        ({"interval_levels": [0.5]}, "its intervals are not of its levels"),
    ):
        (tmp_path / "p" / "predictor.json").write_text(json.dumps(description | change))
        with pytest.raises(SelectorError, match=message):
            read_predictor(tmp_path / "p")
    (tmp_path / "p" / "predictor.json").write_text(json.dumps(description))
    (tmp_path / "p" / "predictor.safetensors").write_bytes(b"x")
    with pytest.raises(SelectorError, match="damaged"):
        read_predictor(tmp_path / "p")


def test_too_little_or_broken_data_is_refused(rows):
    with pytest.raises(LabelError, match="at least 32"):
        train_predictor(rows.subset(range(10)), RIDGE)
    features = rows.features.copy()
    features[5, 1] = np.nan
    with pytest.raises(LabelError, match="nll of .* on t is not a finite number"):
        train_predictor(replace(rows, features=features), RIDGE)


def test_metrics_of_a_constant_and_of_the_truth(rows):
    assert row_metrics(rows, rows.utility) == {"r2": 1.0, "spearman": 1.0, "rmse": 0.0}
    assert row_metrics(rows, np.full(len(rows.utility), rows.utility.mean()))["r2"] == pytest.approx(0.0, abs=1e-3)
