"""Longer plans of made-up bases: the whole comparison, with propagators that need the pair tables alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import fold_plan
from simmerge_ray.research.study.analysis import bases_of, bought, joined
from simmerge_ray.research.study.layout import LoadedPart
from simmerge_ray.research.study.longer import PREDICTED
from simmerge_ray.research.study.page import budget_lines, longer_lines
from simmerge_ray.research.study.unseen_base import longer_plans, models_without_base
from simmerge_ray.search.labels import LabeledPlan, Measured
from simmerge_ray.signals.propagation.bound import Bound
from simmerge_ray.signals.propagation.second_order import SecondOrder
from tests.unit.selector.made_up import SETTINGS, made_up_labels, made_up_table

CONFIG = TrainConfig(num_members=2, num_epochs=30)
ARMS = ("linear", "ties")


def part(name: str) -> LoadedPart:
    table = made_up_table(name)
    own = table.provenance["own_task"]
    refs = tuple(CheckpointRef(one, Path(one), f"{name}-base") for one in table.checkpoint_ids)
    catalogue = Catalogue(refs, own, CheckpointRef(f"{name}-base", Path("base")))
    labels = made_up_labels(table)
    generator = np.random.default_rng(0)
    members = table.checkpoint_ids[:3]
    for order in (members, members[::-1], (members[1], members[0], members[2]), (members[2], members[0], members[1])):
        for arms in (("linear",), ("ties",), ("linear", "ties")):
            for weighting in ("equal", "halving"):
                plan = fold_plan(order, [make_arm(arm) for arm in arms], weighting)
                for task in table.tasks:
                    items = (generator.random(40) < 0.5).astype(float)
                    labels.append(LabeledPlan(plan, task, f"items-{task}", Measured(items), SETTINGS, {}))
    return LoadedPart(name, catalogue, table, tuple(labels), "")


@pytest.fixture(scope="module")
def parts() -> list[LoadedPart]:
    return [part(name) for name in ("s1", "s2", "s3")]


def test_every_policy_is_compared_for_every_propagator(parts):
    dataset = joined(parts, ARMS)
    made = {"bound": lambda one: Bound(one.table), "second_order": lambda one: SecondOrder(one.table)}
    found = longer_plans(parts, dataset, bases_of(parts), CONFIG, made)
    for name in made:
        rows = {row["policy"]: row for row in found["tables"][f"{name}, 3-way, equal"]}
        assert rows[PREDICTED]["num_groups"] == 3 and rows[PREDICTED]["difference"] == 0.0
        assert rows["best of the candidates"]["difference"] <= 0.0
        assert {"random plan", "equal-weight linear", "best fixed arm, random order"} <= set(rows)
        assert set(found["tau"][name]) == {"3"} and -1 <= found["tau"][name]["3"]["tau"] <= 1
        assert set(found["aggregates"][name]) == {"last", "mean", "sum"}
    text = "\n".join(longer_lines(found))
    assert "expert degradation" in text and "| second_order | 3 |" in text


def test_a_model_knows_nothing_of_the_base_that_it_is_asked_about(parts):
    dataset, bases = joined(parts, ARMS), bases_of(parts)
    (model,) = models_without_base(dataset, bases, ["s1-base"], CONFIG).values()
    others = joined(parts[1:], ARMS)
    (again,) = models_without_base(others, bases, ["s1-base"], CONFIG).values()
    np.testing.assert_array_equal(model.predict(dataset.features)[0], again.predict(dataset.features)[0])
    (other,) = models_without_base(dataset, bases, ["s2-base"], CONFIG).values()
    assert (model.predict(dataset.features)[0] != other.predict(dataset.features)[0]).any()


def test_what_evaluations_buy_is_drawn(parts, tmp_path):
    timed = [replace(one, signal_seconds=30.0) for one in parts]
    found = bought(timed, joined(parts, ARMS), bases_of(parts), CONFIG)
    num_pairs = len({(context.left, context.right) for context in joined(parts, ARMS).contexts})
    assert found["costs"]["signals"] == pytest.approx(3 * 30.0 / num_pairs)
    lines = budget_lines(found, tmp_path)
    assert (tmp_path / "study-evaluations.png").exists() and lines[0].endswith("(study-evaluations.png)")
    assert {row["strategy"] for row in found["rows"]} == {"predicted", "random", "Optuna", "few items"}
