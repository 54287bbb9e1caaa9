"""The table of pair signals, kept as Parquet."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simmerge_ray.base.errors import ConfigError, PlanError, shown_value, unknown_name
from simmerge_ray.base.json_text import parse_json
from simmerge_ray.base.storage import Place, read_bytes, write_atomically
from simmerge_ray.signals.features import FEATURE_SCHEMA, swapped_features


@dataclass(frozen=True)
class PairSignals:
    """All signals of one ordered pair on the probes of one task."""

    left: str
    right: str
    task: str
    features: Mapping[str, float]

    def swap(self) -> PairSignals:
        """The same for (right, left)."""
        return PairSignals(self.right, self.left, self.task, swapped_features(self.features))


@dataclass(frozen=True)
class SignalTable:
    """Signals of every ordered pair and task of a catalogue; `provenance` says from what they were computed.

    rows: by (left, right, task), pairs with the base included; these lack the columns of task vectors.
    """

    columns: tuple[str, ...]
    rows: Mapping[tuple[str, str, str], PairSignals]
    provenance: Mapping[str, Any]

    def get(self, left: str, right: str, task: str) -> PairSignals:
        """Signals of two checkpoints of the catalogue on `task`.

        Raises:
            PlanError: the checkpoint or the task is not in the table, or both checkpoints are the same.
        """
        self.check((left, right), task)
        if left == right:
            raise PlanError(f"left and right are both {left!r}; a pair needs two different checkpoints")
        return self.rows[left, right, task]

    def check(self, checkpoints: Iterable[str], task: str) -> None:
        """Raises PlanError for what is not in the table."""
        for name in checkpoints:
            if name not in self.checkpoint_ids:
                raise PlanError(unknown_name("checkpoint", name, self.checkpoint_ids))
        if task not in self.tasks:
            raise PlanError(unknown_name("task", task, self.tasks))

    @cached_property
    def checkpoint_ids(self) -> tuple[str, ...]:
        """Sorted, the base not included."""
        return tuple(sorted({key[0] for key in self.rows} - {self.provenance.get("base")}))

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        return tuple(sorted({key[2] for key in self.rows}))

    def pair_tasks(self, left: str, right: str) -> tuple[str, ...]:
        """Tasks of the table that the pair was fine-tuned for, sorted; all tasks where that is not known."""
        own = {self.provenance["own_task"].get(name) for name in (left, right)}
        return tuple(task for task in self.tasks if task in own) or self.tasks

    def write(self, uri: str | Place) -> None:
        """Write as Parquet: columns left, right, task and one per feature; provenance in the file's metadata.

        Where a pair has no such feature (the base has no task vector) the cell is null.
        """
        keys = sorted(self.rows)
        columns: dict[str, Any] = dict(zip(("left", "right", "task"), zip(*keys, strict=True), strict=True))
        columns |= {name: [self.rows[key].features.get(name) for key in keys] for name in self.columns}
        meta = json.dumps({"schema": FEATURE_SCHEMA, "columns": self.columns, "provenance": self.provenance})
        table = pa.table(columns).replace_schema_metadata({"simmerge_ray": meta})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_atomically(uri, buffer.getvalue())


def read_signal_table(uri: str | Place) -> SignalTable:
    """Read a table written by `SignalTable.write`.

    Raises:
        ConfigError: no such file, not such a table, or one of another feature schema.
    """
    try:
        content = read_bytes(uri)
    except FileNotFoundError:
        raise ConfigError(f"no signal table at {uri}; `simmerge signals` makes one") from None
    except OSError as error:
        raise ConfigError(f"cannot read the signal table {uri}: {error.strerror}") from None
    try:
        table = pq.read_table(io.BytesIO(content))
        meta = parse_json((table.schema.metadata or {})[b"simmerge_ray"])
        schema = meta["schema"]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        raise ConfigError(f"{uri} is not a signal table") from None
    if schema != FEATURE_SCHEMA:
        raise ConfigError(
            f"{uri} has feature schema {shown_value(schema)}, this version reads {FEATURE_SCHEMA}; compute it again"
        )
    try:
        return _table_of(table, meta)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"the signal table {uri} is damaged ({type(error).__name__}: {str(error)[:200]}); compute it again"
        ) from None


def _table_of(table: pa.Table, meta: Mapping[str, Any]) -> SignalTable:
    """Raises KeyError, TypeError, ValueError, AttributeError: a part is missing, or of another kind."""
    columns, provenance = tuple(meta["columns"]), meta["provenance"]
    if not all(isinstance(part, dict) for part in (provenance, provenance["own_task"])):
        raise TypeError("its provenance is no object")
    rows = {}
    for row in table.to_pylist():
        key = left, right, task = row["left"], row["right"], row["task"]
        features = {column: row[column] for column in columns if row[column] is not None}
        if not all(isinstance(name, str) for name in key):
            raise TypeError(f"a row is of {shown_value(key)}")
        if not all(isinstance(value, float) and math.isfinite(value) for value in features.values()):
            raise TypeError(f"a signal of {left}, {right} on {task} is not a finite number")
        rows[key] = PairSignals(left, right, task, features)
    ids = {name for left, right, _ in rows for name in (left, right)}
    wanted = product(ids, ids, {task for _, _, task in rows})
    if missing := [key for key in wanted if key[0] != key[1] and key not in rows]:
        raise ValueError(f"there is no row of {shown_value(missing[0])}")
    return SignalTable(columns, rows, provenance)
