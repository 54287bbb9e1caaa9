"""Small data sets in which one feature decides the best arm, or nothing does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, pair_plan
from simmerge_ray.search.headroom import Context
from simmerge_ray.search.labels import EvaluationSettings, LabeledPlan, LabelStore, Measured
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.signals.table import SignalTable
from tests.tables import synthetic_table

SETTINGS = EvaluationSettings("fake", "float32", 128)

ARMS = ("linear", "nuslerp", "ties")
COLUMNS = ("loss_left", "loss_right", "entropy_left", "entropy_right", "weight_cosine_global", "sign_conflict_global")


def planted(
    num_checkpoints: int = 8, learnable: bool = True, seed: int = 0, num_items: int = 100, num_features: int = 6
) -> SelectionDataset:
    """All pairs on two tasks; the sign of the last feature says whether `linear` or `ties` is the best arm."""
    generator = np.random.default_rng(seed)
    contexts, features, utilities = [], [], []
    names = [f"c{i}" for i in range(num_checkpoints)]
    for i, left in enumerate(names):
        for right in names[i + 1 :]:
            x = generator.normal(size=num_features)
            for task in ("s", "t"):
                noise = 0.1 * generator.normal(size=num_features)
                best = (0 if x[-1] > 0 else 2) if learnable else int(generator.integers(3))
                rates = [0.4, 0.5, 0.4]
                rates[best] = 0.75
                arms = {a: (generator.random(num_items) < r).astype(float) for a, r in zip(ARMS, rates, strict=True)}
                parents = [(generator.random(num_items) < rate).astype(float) for rate in (0.9, 0.1)]
                contexts.append(Context(left, right, task, arms, *parents))
                features.append([x + noise, x + noise])
                utilities.append([arms[arm].mean() for arm in ARMS])
    columns = COLUMNS[:num_features]
    return SelectionDataset(tuple(contexts), ARMS, columns, np.array(features), np.array(utilities))


def made_up_table(part: str, num_checkpoints: int = 5, tasks: tuple[str, ...] = ("s", "t")) -> SignalTable:
    """A signal table of one base, all ids beginning with the name of the part."""
    table = synthetic_table(num_checkpoints, tasks, seed=len(part) + ord(part[-1]))

    def named(checkpoint_id: str) -> str:
        return f"{part}-{checkpoint_id}"

    rows = {
        (named(left), named(right), task): replace(row, left=named(left), right=named(right))
        for (left, right, task), row in table.rows.items()
    }
    provenance = {
        "base": named("base"),
        "own_task": {named(name): task for name, task in table.provenance["own_task"].items()},
        "checkpoints": {named(name): digest for name, digest in table.provenance["checkpoints"].items()},
        "weights": "exact",
    }
    return SignalTable(table.columns, rows, provenance)


def made_up_labels(table: SignalTable, num_items: int = 40) -> list[LabeledPlan]:
    """All pairs by `linear` and `ties` on both tasks, and all checkpoints as they are, the base included."""
    generator = np.random.default_rng(len(table.checkpoint_ids))
    ids = table.checkpoint_ids
    plans = [MergePlan(source=name) for name in (*ids, table.provenance["base"])]
    for i, left in enumerate(ids):
        plans += [pair_plan(left, right, make_arm(arm)) for right in ids[i + 1 :] for arm in ("linear", "ties")]
    rates = {name: 0.2 if index % 2 else 0.9 for index, name in enumerate(ids)}
    labels = []
    for plan in plans:
        digests = {name: table.provenance["checkpoints"][name] for name in plan.members}
        rate = rates.get(plan.source or "", 0.6)
        for task in table.tasks:
            items = (generator.random(num_items) < rate).astype(float)
            labels.append(LabeledPlan(plan, task, f"items-{task}", Measured(items), SETTINGS, digests))
    return labels


def write_study(root: Path, parts: Sequence[str], num_checkpoints: int = 5) -> Path:
    """`signals/<part>/pairs.parquet` and `labels/<part>/` below `root`, which is returned."""
    for part in parts:
        table = made_up_table(part, num_checkpoints)
        table.write(root / "signals" / part / "pairs.parquet")
        LabelStore(root / "labels" / part).append(made_up_labels(table))
    return root
