"""Labels of a small search, and their files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simmerge_ray.base import storage
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, pair_plan
from simmerge_ray.search.labels import (
    EvaluationSettings,
    Infeasible,
    LabeledPlan,
    LabelStore,
    Measured,
    Stopped,
)

SETTINGS = EvaluationSettings("fake", "float32", 128)


def label(plan: MergePlan, task: str = "t", outcome=None, **changes) -> LabeledPlan:
    outcome = outcome or Measured(np.array([1.0, 0.0, 1.0, 1.0]))
    checkpoints = {name: f"digest-{name}" for name in plan.members}
    return dataclasses.replace(LabeledPlan(plan, task, f"items-{task}", outcome, SETTINGS, checkpoints, 0.5), **changes)


def pair_labels(left: str = "a", right: str = "b") -> list[LabeledPlan]:
    merges = [pair_plan(left, right, make_arm(name)) for name in ("linear", "nuslerp")]
    return [label(plan) for plan in (*merges, MergePlan(source=left), MergePlan(source=right))]


def stopped(*items: float) -> Stopped:
    return Stopped(np.array(items))


def variants(plan: MergePlan) -> list[LabeledPlan]:
    """Outcomes of one key, the one to keep first."""
    outcomes = [None, stopped(1.0, 0.0, 1.0), stopped(1.0), Infeasible("engine died")]
    return [label(plan, outcome=outcome) for outcome in outcomes]


def contents(labels: list[LabeledPlan]) -> list[tuple]:
    """What can be compared of labels: arrays as lists."""
    found = []
    for one in labels:
        outcome = one.outcome.reason if isinstance(one.outcome, Infeasible) else one.outcome.items.tolist()
        found.append((one.key, type(one.outcome), outcome, one.seconds, one.same_as, dict(one.versions)))
    return found


def with_duplicates() -> list[LabeledPlan]:
    """Labels of five keys: all outcomes, repetitions that took longer, and a conflict."""
    again = [dataclasses.replace(one, seconds=9.0) for one in pair_labels()]
    again[0] = dataclasses.replace(again[0], outcome=Measured(np.array([0.0, 0.0, 1.0, 0.0])))
    return [*pair_labels(), *again, *variants(pair_plan("a", "c", make_arm("ties")))[1:]]


def as_older_file(file: Path) -> None:
    """Turn a label file into one of schema 1."""
    table = pq.read_table(file).drop_columns(["same_as", "stopped", "num_items", "operators", "members"])
    number = table.schema.get_field_index("schema")
    pq.write_table(table.set_column(number, "schema", pa.array([1] * len(table))), file)


def num_files(store: LabelStore) -> int:
    return len(storage.list_objects(store.uri, ".parquet"))
