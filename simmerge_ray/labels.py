"""Labels: the measured utility of a plan on a task, in append-only Parquet files under a URI.

Every flush is one file, named by the digest of its keys and written once, so several writers never collide, a kill
loses at most the trial in flight, and object stores without rename serve. A key is what the utility depends on: plan,
contents of the checkpoints, task, evaluation settings. `read` keeps one row per key: a measured one before an
infeasible one, then the one from the file whose name sorts first.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simmerge_ray.errors import LabelError
from simmerge_ray.headroom import Context
from simmerge_ray.plans import MergePlan, plan_from_json
from simmerge_ray.storage import digest_bytes, digest_json, list_objects, read_bytes, write_once

LABEL_SCHEMA = 1
_ARROW_SCHEMA = pa.schema(
    [
        ("key", pa.string()), ("plan_id", pa.string()), ("plan", pa.string()), ("label", pa.string()),
        ("task", pa.string()), ("task_digest", pa.string()), ("utility", pa.float64()), ("se", pa.float64()),
        ("items", pa.list_(pa.float32())), ("infeasible", pa.string()), ("seconds", pa.float64()),
        ("evaluator", pa.string()), ("settings", pa.string()), ("checkpoints", pa.string()), ("versions", pa.string()),
        ("schema", pa.int64()), ("same_as", pa.string()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Per-item utilities of an evaluated merge, (num_items,) in [0, 1]."""

    items: np.ndarray

    @property
    def utility(self) -> float:
        return float(self.items.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, from the items' variance."""
        return float(self.items.std(ddof=1) / np.sqrt(len(self.items))) if len(self.items) > 1 else 0.0


@dataclass(frozen=True)
class Infeasible:
    """Why a merge has no utility."""

    reason: str


Outcome = Measured | Infeasible


@dataclass(frozen=True)
class EvaluationSettings:
    """What a utility depends on besides weights and items."""

    evaluator: str
    dtype: str
    max_model_len: int


@dataclass(frozen=True)
class LabeledPlan:
    """One (plan, task) with its outcome and all it was made from.

    checkpoints: content digest of every checkpoint that was read, by id. seconds: merge and evaluation. same_as: label
    of the plan that was evaluated in its place, because both are one merge.
    """

    plan: MergePlan
    task: str
    task_digest: str
    outcome: Outcome
    settings: EvaluationSettings
    checkpoints: Mapping[str, str]
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    same_as: str | None = None

    @property
    def key(self) -> str:
        return label_key(self.plan, self.task_digest, self.settings, self.checkpoints)


def label_key(plan: MergePlan, task_digest: str, settings: EvaluationSettings, checkpoints: Mapping[str, str]) -> str:
    """Digest of all that a utility depends on."""
    return digest_json([LABEL_SCHEMA, plan.id, task_digest, vars(settings), dict(checkpoints)])


def used_digests(plan: MergePlan, digests: Mapping[str, str], base_id: str | None) -> dict[str, str]:
    """Content digests of the checkpoints that a plan reads, the base only where an operator takes it."""
    used = [*plan.members, *([base_id] if base_id and plan.uses_base else [])]
    return {checkpoint_id: digests[checkpoint_id] for checkpoint_id in sorted(set(used))}


class LabelStore:
    """Labels under a directory URI."""

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri).rstrip("/")

    def append(self, labels: Sequence[LabeledPlan]) -> None:
        """Write labels as one file; writing the same labels again replaces that file by an equal one."""
        if not labels:
            return
        rows = [_to_row(label) for label in labels]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_ARROW_SCHEMA), buffer)
        name = digest_bytes(*(row["key"].encode() for row in rows))
        write_once(f"{self.uri}/{name}.parquet", buffer.getvalue())

    def read(self) -> list[LabeledPlan]:
        """All labels, one per key, sorted by key.

        Raises:
            LabelError: a file of another schema version, or one that is no label file.
        """
        kept: dict[str, LabeledPlan] = {}
        for name in list_objects(self.uri, ".parquet"):
            for label in _read_file(name):
                known = kept.get(label.key)
                if known is None or (isinstance(known.outcome, Infeasible) and isinstance(label.outcome, Measured)):
                    kept[label.key] = label
        return [kept[key] for key in sorted(kept)]

    def digest(self) -> str:
        """Identity of the labels: their keys and utilities."""
        outcomes = ((label.key, label.outcome) for label in self.read())
        return digest_json([[key, o.utility if isinstance(o, Measured) else o.reason] for key, o in outcomes])

    def keys(self) -> set[str]:
        """Keys of all labels."""
        return {label.key for label in self.read()}


def _to_row(label: LabeledPlan) -> dict[str, Any]:
    measured = isinstance(label.outcome, Measured)
    return {
        "key": label.key,
        "plan_id": label.plan.id,
        "plan": json.dumps(label.plan.to_json()),
        "label": label.plan.label,
        "task": label.task,
        "task_digest": label.task_digest,
        "utility": label.outcome.utility if isinstance(label.outcome, Measured) else None,
        "se": label.outcome.standard_error if isinstance(label.outcome, Measured) else None,
        "items": label.outcome.items.tolist() if isinstance(label.outcome, Measured) else None,
        "infeasible": None if measured else label.outcome.reason,  # type: ignore[union-attr]
        "seconds": label.seconds,
        "evaluator": label.settings.evaluator,
        "settings": json.dumps(vars(label.settings), sort_keys=True),
        "checkpoints": json.dumps(dict(label.checkpoints), sort_keys=True),
        "versions": json.dumps(dict(label.versions), sort_keys=True),
        "schema": LABEL_SCHEMA,
        "same_as": label.same_as,
    }


def _read_file(name: str) -> list[LabeledPlan]:
    try:
        rows = pq.read_table(io.BytesIO(read_bytes(name))).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise LabelError(f"{name} is not a label file: {error}") from None
    labels = []
    for row in rows:
        if row.get("schema") != LABEL_SCHEMA:
            raise LabelError(f"{name} has label schema {row.get('schema')}, this version reads {LABEL_SCHEMA}")
        outcome: Outcome
        if row["infeasible"] is None:
            outcome = Measured(np.array(row["items"], dtype=np.float64))
        else:
            outcome = Infeasible(row["infeasible"])
        labels.append(
            LabeledPlan(
                plan=plan_from_json(json.loads(row["plan"])),
                task=row["task"],
                task_digest=row["task_digest"],
                outcome=outcome,
                settings=EvaluationSettings(**json.loads(row["settings"])),
                checkpoints=json.loads(row["checkpoints"]),
                seconds=row["seconds"],
                versions=json.loads(row["versions"]),
                same_as=row.get("same_as"),  # files of before do not have it
            )
        )
    return labels


def single_items(labels: Iterable[LabeledPlan]) -> dict[tuple[str, str], np.ndarray]:
    """Per-item utilities of unmerged checkpoints by (checkpoint id, task)."""
    return {
        (label.plan.source, label.task): label.outcome.items
        for label in labels
        if label.plan.source is not None and isinstance(label.outcome, Measured)
    }


def pair_contexts(labels: Sequence[LabeledPlan], arms: Sequence[str]) -> list[Context]:
    """Contexts (pair, task) in which every one of `arms` and both parents were measured, sorted.

    Raises:
        LabelError: two labels disagree on the items, evaluator or settings, so they must not be compared.
    """
    check_comparable(labels)
    singles = single_items(labels)
    found: dict[tuple[str, str, str], dict[str, np.ndarray]] = {}
    for label in labels:
        if len(label.plan.steps) == 1 and isinstance(label.outcome, Measured):
            step = label.plan.steps[0]
            left, right = sorted((step.left, step.right))
            found.setdefault((left, right, label.task), {})[step.arm.label] = label.outcome.items
    contexts = []
    for (left, right, task), utilities in sorted(found.items()):
        parents = [singles.get((parent, task)) for parent in (left, right)]
        if all(arm in utilities for arm in arms) and parents[0] is not None and parents[1] is not None:
            contexts.append(Context(left, right, task, {arm: utilities[arm] for arm in arms}, parents[0], parents[1]))
    return contexts


def check_comparable(labels: Sequence[LabeledPlan]) -> None:
    """Refuse to mix labels of different items, evaluators or checkpoint contents under one name.

    Raises:
        LabelError: naming what differs.
    """
    items: dict[str, str] = {}
    contents: dict[str, str] = {}
    settings: EvaluationSettings | None = None
    for label in labels:
        if items.setdefault(label.task, label.task_digest) != label.task_digest:
            raise LabelError(
                f"labels of task {label.task!r} were made with different items; keep them in separate stores"
            )
        if settings is not None and settings != label.settings:
            raise LabelError(f"labels were made with different settings: {settings} and {label.settings}")
        settings = label.settings
        for checkpoint_id, digest in label.checkpoints.items():
            if contents.setdefault(checkpoint_id, digest) != digest:
                raise LabelError(f"labels were made with different contents of checkpoint {checkpoint_id!r}")
