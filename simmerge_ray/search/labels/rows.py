"""Labels as rows of Parquet files: written, read, and checked for contradictions."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simmerge_ray.base.errors import LabelError, StorageError, shown_value
from simmerge_ray.base.json_text import parse_json
from simmerge_ray.base.storage import digest_bytes, read_bytes
from simmerge_ray.plans.plan import plan_from_json
from simmerge_ray.search.labels.outcomes import (
    Evaluated,
    EvaluationSettings,
    Infeasible,
    LabeledPlan,
    Measured,
    Outcome,
    Stopped,
)

# Schema 2 has stopped trials, which a reader of schema 1 would take for measured ones.
LABEL_SCHEMA = 2
_KNOWN_SCHEMAS = (1, 2)
_ARROW_SCHEMA = pa.schema(
    [
        ("key", pa.string()), ("plan_id", pa.string()), ("plan", pa.string()), ("label", pa.string()),
        ("task", pa.string()), ("task_digest", pa.string()), ("utility", pa.float64()), ("se", pa.float64()),
        ("items", pa.list_(pa.float32())), ("infeasible", pa.string()), ("seconds", pa.float64()),
        ("evaluator", pa.string()), ("settings", pa.string()), ("checkpoints", pa.string()), ("versions", pa.string()),
        ("schema", pa.int64()), ("same_as", pa.string()), ("stopped", pa.bool_()), ("num_items", pa.int64()),
        ("operators", pa.string()), ("members", pa.list_(pa.string())),
    ]
)  # fmt: skip
_ROUNDING = 1e-6  # items are float32; rows of schema 1 have the mean of what they were before


def row_digest(row: Mapping[str, Any]) -> str:
    return digest_bytes(json.dumps(row, sort_keys=True).encode())


def file_name(rows: Sequence[Mapping[str, Any]]) -> str:
    """By all that the rows say: were it their keys alone, a later outcome would overwrite an earlier one."""
    return f"{digest_bytes(*(row_digest(row).encode() for row in rows))}.parquet"


def parquet_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The file of some rows."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_ARROW_SCHEMA), buffer)
    return buffer.getvalue()


def to_row(label: LabeledPlan) -> dict[str, Any]:
    outcome = label.outcome
    evaluated = None
    if not isinstance(outcome, Infeasible):
        # As stored, so that `utility` is the mean of `items`, and a label that is read makes the same row again.
        evaluated = Evaluated(outcome.items.astype(np.float32).astype(np.float64))
    return {
        "key": label.key,
        "plan_id": label.plan.id,
        "plan": json.dumps(label.plan.to_json()),
        "label": label.plan.label,
        "task": label.task,
        "task_digest": label.task_digest,
        "utility": evaluated.utility if evaluated else None,
        "se": evaluated.standard_error if evaluated else None,
        "items": evaluated.items.tolist() if evaluated else None,
        "infeasible": outcome.reason if isinstance(outcome, Infeasible) else None,
        "seconds": label.seconds,
        "evaluator": label.settings.evaluator,
        "settings": json.dumps(vars(label.settings), sort_keys=True),
        "checkpoints": json.dumps(dict(label.checkpoints), sort_keys=True),
        "versions": json.dumps(dict(label.versions), sort_keys=True),
        "schema": LABEL_SCHEMA,
        "same_as": label.same_as,
        "stopped": isinstance(outcome, Stopped),
        "num_items": len(evaluated.items) if evaluated else 0,
        "operators": " ; ".join(arm.label for arm in label.plan.arms),
        "members": list(label.plan.members),
    }


def _read_rows(name: str) -> list[dict[str, Any]]:
    """Rows of a file. Raises LabelError for what is no label file, FileNotFoundError for what is not there any more."""
    try:
        file = pq.ParquetFile(pa.BufferReader(read_bytes(name)), pre_buffer=False)
        rows: list[dict[str, Any]] = file.read(use_threads=False).to_pylist()  # a store has thousands of small files
    except (FileNotFoundError, StorageError):
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise LabelError(f"{name} is not a label file: {error}") from None
    for row in rows:
        if row.get("schema") not in _KNOWN_SCHEMAS:
            known = " and ".join(map(str, _KNOWN_SCHEMAS))
            raise LabelError(f"{name} has label schema {row.get('schema')}, this version reads {known}")
    return rows


def _from_row(name: str, number: int, row: Mapping[str, Any]) -> LabeledPlan:
    """A row as a label. Raises LabelError: it is none for anybody: a text is missing, or items are no utilities."""
    try:
        for column in ("task", "task_digest"):
            if not isinstance(row[column], str):
                raise ValueError(f"{column} is {shown_value(row[column])}; it must be text")
        for column in ("infeasible", "same_as"):  # older files lack the latter
            if not isinstance(row.get(column), str | None):
                raise ValueError(f"{column} is {shown_value(row[column])}; it must be text, or nothing")
        outcome: Outcome
        if row["infeasible"] is not None:
            outcome = Infeasible(row["infeasible"])
        elif row["items"] is None:
            raise ValueError("neither items nor a reason why there are none")
        else:
            kind = Stopped if row.get("stopped") else Measured
            outcome = kind(_items(row["items"]))
        return LabeledPlan(
            plan=plan_from_json(parse_json(row["plan"])),
            task=row["task"],
            task_digest=row["task_digest"],
            outcome=outcome,
            settings=_settings(parse_json(row["settings"])),
            checkpoints=_texts(parse_json(row["checkpoints"])),
            seconds=_seconds(row["seconds"]),
            versions=_texts(parse_json(row["versions"])),
            same_as=row.get("same_as"),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LabelError(f"{name}, row {number}: {error}") from None


def _items(found: Sequence[Any]) -> np.ndarray:
    """Raises ValueError: there are none, or one is no utility."""
    items = np.array(found, dtype=np.float64)
    if items.ndim != 1 or not items.size:
        raise ValueError("has no items")
    outside = items[~((items >= 0) & (items <= 1))]
    if len(outside):
        raise ValueError(f"items outside [0, 1]: {', '.join(f'{item:.6g}' for item in outside[:3])}")
    return items


def _settings(found: Any) -> EvaluationSettings:
    settings = EvaluationSettings(**found)
    kinds = [type(value) for value in vars(settings).values()]
    if kinds != [str, str, int]:
        raise ValueError(f"settings are {shown_value(found)}; needed are two texts and an integer")
    return settings


def _texts(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"an object of texts is needed, got {shown_value(found)}")
    return found


def _seconds(found: Any) -> float:
    if not isinstance(found, float) or not 0 <= found < math.inf:
        raise ValueError(f"seconds is {found!r}; it must be a number from 0 on")
    return found


def read_labels(name: str) -> list[LabeledPlan]:
    return [_from_row(name, number, row) for number, row in enumerate(_read_rows(name), 1)]


def check_rows(name: str) -> tuple[list[LabeledPlan], list[str]]:
    """The labels of a file that can be read, and its problems."""
    labels: list[LabeledPlan] = []
    problems: list[str] = []
    try:
        rows = _read_rows(name)
    except LabelError as error:
        return [], [str(error)]
    for number, row in enumerate(rows, 1):
        try:
            labels.append(_from_row(name, number, row))
        except LabelError as error:
            problems.append(str(error))
            continue
        problems += [f"{name}, row {number}: {problem}" for problem in _row_problems(row, labels[-1])]
    return labels, problems


def _row_problems(row: Mapping[str, Any], label: LabeledPlan) -> list[str]:
    """Where a row contradicts itself."""
    problems = []
    if row.get("key") != label.key:
        problems.append(f"key {shown_value(row.get('key'))} does not belong to {label.plan.label} on {label.task}")
    if isinstance(label.outcome, Infeasible):
        return problems
    items = label.outcome.items
    if row.get("num_items") not in (None, len(items)):
        problems.append(f"num_items is {row['num_items']}, it has {len(items)}")
    said = row.get("utility")
    if not isinstance(said, float) or not abs(said - label.outcome.utility) <= _ROUNDING:
        problems.append(f"utility is {shown_value(said)}, the mean of its items is {label.outcome.utility:.6g}")
    return problems
