"""Signals and labels of tiny checkpoints through training to an answer, without Ray."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import ConfigError, LabelError, PlanError, SelectorError
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, pair_plans
from simmerge_ray.search.labels import EvaluationSettings, LabeledPlan, Measured, used_digests
from simmerge_ray.selector.data.dataset import build_dataset
from simmerge_ray.selector.models.policy import INTERVAL_LEVELS, Intervals
from simmerge_ray.selector.models.train import train_selector
from simmerge_ray.selector.planning.recommender import Recommender
from simmerge_ray.service.schemas import DecisionRequest
from simmerge_ray.signals.compute import compute_signals
from simmerge_ray.signals.table import SignalTable
from tests import tiny

ARMS = [make_arm("linear"), make_arm("ties", {"density": 0.2})]


def made_up_labels(catalogue, digests: dict[str, str]) -> list[LabeledPlan]:
    """Random outcomes for every pair, parent and task: the join is tested, not the merges."""
    generator = np.random.default_rng(0)
    plans = [MergePlan(source=name) for name in catalogue.ids] + pair_plans(catalogue.pairs("all"), ARMS)
    settings = EvaluationSettings("fake", "float32", 64)
    return [
        LabeledPlan(
            plan,
            task,
            task,
            Measured((generator.random(20) < 0.5).astype(float)),
            settings,
            used_digests(plan, digests, "base"),
        )
        for plan in plans
        for task in ("add", "copy")
    ]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> SignalTable:
    from simmerge_ray.checkpoints.catalogue import load_catalogue

    path = tiny.make_catalogue(tmp_path_factory.mktemp("four"), num_checkpoints=4)
    table = compute_signals(load_catalogue(path), load_probe_sets(path.parent / "probes"))
    return SignalTable(table.columns, table.rows, table.provenance | {"catalogue": str(path)})


@pytest.fixture(scope="module")
def labels(table):
    from pathlib import Path

    from simmerge_ray.checkpoints.catalogue import load_catalogue

    return made_up_labels(load_catalogue(Path(table.provenance["catalogue"])), table.provenance["checkpoints"])


@pytest.fixture(scope="module")
def recommender(table, labels) -> Recommender:
    dataset = build_dataset(table, labels)
    assert dataset.arms == ("linear", "ties(density=0.2)") and dataset.features.shape == (12, 2, len(table.columns))
    return Recommender(train_selector(dataset, TrainConfig(num_epochs=20)), table)


def test_arms_are_ranked_for_the_parents_own_tasks(recommender):
    ranked = recommender.recommend("m0", "m1").ranked
    assert [r.utility for r in ranked] == sorted((r.utility for r in ranked), reverse=True)
    assert set(ranked[0].by_task) == {"add", "copy"}
    assert set(recommender.recommend("m0", "m2").ranked[0].by_task) == {"add"}
    assert ranked[0].utility == pytest.approx(np.mean([u for u, _ in ranked[0].by_task.values()]))
    assert all(0.0 <= u <= 1.0 for r in ranked for u, _ in r.by_task.values())
    swapped = recommender.recommend("m1", "m0").ranked
    assert [r.arm for r in swapped] == [r.arm for r in ranked]
    assert swapped[0].utility == pytest.approx(ranked[0].utility, rel=1e-6)


def test_a_recommendation_names_the_arm_to_take_and_why(recommender):
    answer = recommender.recommend("m0", "m1", ["add"])
    assert answer.choice.arm == answer.chosen.arm and answer.limit > 0
    assert answer.choice.overrode == (answer.choice.arm != recommender.selector.best_fixed)
    assert recommender.selector.best_fixed in {one.arm for one in answer.ranked}
    assert recommender.recommend("m0", "m1", ["add"]) == answer
    assert len(recommender.selector.version) == 12


def with_override(recommender, threshold: float, **changes) -> Recommender:
    """The same predictions, the arm that is predicted to be the worse one taken for the best fixed one."""
    selector = recommender.selector
    worse = recommender.recommend("m0", "m1").ranked[-1].arm
    override = replace(selector.override, best_fixed=worse, threshold=threshold)
    return Recommender(replace(selector, override=override, **changes), recommender.table)


def test_the_best_fixed_arm_is_left_where_that_has_paid(recommender):
    best = recommender.recommend("m0", "m1").ranked[0].arm
    bold, careful = with_override(recommender, 0.0), with_override(recommender, np.inf)
    assert bold.recommend("m0", "m1").choice.arm == best and bold.recommend("m0", "m1").choice.overrode
    for one in (bold, careful):  # what is predicted does not depend on the policy
        assert [row.arm for row in one.recommend("m0", "m1").ranked][0] == best
    answer = careful.recommend("m0", "m1")
    assert answer.choice.arm == careful.selector.best_fixed != answer.ranked[0].arm and not answer.choice.overrode
    assert "too few checkpoints to leave some out" in answer.choice.reason  # nothing was left out here
    measured = replace(careful.selector.override, gain=0.0)
    told = Recommender(replace(careful.selector, override=measured), careful.table).recommend("m0", "m1")
    assert "has not paid on checkpoints that were left out" in told.choice.reason


def test_checkpoints_unlike_those_of_the_training_get_the_best_fixed_arm(recommender):
    near = replace(recommender.selector.novelty, limit=0.0)
    distant = with_override(recommender, 0.0, novelty=near)
    answer = distant.recommend("m0", "m1")
    assert answer.choice.reason.startswith("not trained for such checkpoints")
    assert answer.choice.distance > answer.limit
    assert answer.choice.arm == distant.selector.best_fixed and not answer.choice.overrode


def test_intervals_are_those_of_the_selector_or_none(recommender):
    def ranked(intervals) -> tuple:
        return (
            Recommender(replace(recommender.selector, intervals=intervals), recommender.table)
            .recommend("m0", "m1")
            .ranked
        )

    assert all(row.interval is None for row in ranked(None))
    assert 1.95 * recommender.selector.label_error < 0.3  # below that it would be widened
    widths = np.tile([[0.3, 0.4]], (len(INTERVAL_LEVELS), 1))
    for row in ranked(Intervals(INTERVAL_LEVELS, widths)):
        half = dict(zip(recommender.selector.arms, (0.3, 0.4), strict=True))[row.arm]
        assert row.interval == pytest.approx((max(0.0, row.utility - half), min(1.0, row.utility + half)))


def test_unknown_names_are_refused_with_the_choices(recommender):
    with pytest.raises(PlanError, match="unknown checkpoint 'm7'.*m0, m1"):
        recommender.recommend("m0", "m7")
    with pytest.raises(PlanError, match="unknown task 'ad'"):
        recommender.recommend("m0", "m1", ["ad"])


@pytest.mark.parametrize("name", ["../etc/passwd", "a b", "", "x" * 201, "'; drop table"])
def test_requests_hold_ids_and_nothing_else(name):
    with pytest.raises(ValidationError):
        DecisionRequest(left=name, right="m1")


def test_a_table_with_other_features_is_refused(recommender, table):
    columns = tuple(column for column in table.columns if not column.startswith("task_vector"))
    other = SignalTable(columns, table.rows, table.provenance)
    with pytest.raises(SelectorError, match="different features, e.g. 'task_vector"):
        Recommender(recommender.selector, other).recommend("m0", "m1", ["add"])


def test_a_selector_of_exact_weight_signals_is_not_asked_about_sampled_ones(recommender, table):
    other = SignalTable(table.columns, table.rows, table.provenance | {"weights": "sampled"})
    with pytest.raises(SelectorError, match="trained with exact weight signals, the table has sampled"):
        Recommender(recommender.selector, other).recommend("m0", "m1", ["add"])


def test_signals_and_labels_of_different_contents_are_not_joined(table, labels):
    changed = SignalTable(table.columns, table.rows, table.provenance | {"checkpoints": {"m1": "another upload"}})
    with pytest.raises(LabelError, match="'m1' has changed"):
        build_dataset(changed, labels)
    with pytest.raises(LabelError, match="no pair was measured with all of the arms slerp"):
        build_dataset(table, labels, ["slerp"])


def test_missing_artifacts_say_which_command_makes_them(tmp_path):
    with pytest.raises(SelectorError, match="simmerge train"):
        Recommender.load(tmp_path, tmp_path / "pairs.parquet")


def test_a_table_that_is_missing_says_so_too(tmp_path, recommender):
    recommender.selector.write(tmp_path / "selector")
    with pytest.raises(ConfigError, match="simmerge signals"):
        Recommender.load(tmp_path / "selector", tmp_path / "pairs.parquet")
