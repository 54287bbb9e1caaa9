"""The table of pair signals: computed from units folded in fixed order, kept as Parquet."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simmerge_ray.catalogue import Catalogue
from simmerge_ray.checkpoints import read_headers
from simmerge_ray.errors import ConfigError, PlanError, unknown_name
from simmerge_ray.probes import ProbeSet, TokenBatch
from simmerge_ray.signals.features import FEATURE_SCHEMA, feature_columns, swapped_features
from simmerge_ray.storage import read_bytes, write_once

Unit = tuple[str, Any]
# Maps units to results in any order, each with its index; a Ray executor has the same shape as the local one.
Executor = Callable[[Sequence[Unit]], Iterator[tuple[int, Any]]]


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
    """Signals of every ordered pair and task of a catalogue; `provenance` says from what they were computed."""

    columns: tuple[str, ...]
    rows: Mapping[tuple[str, str, str], PairSignals]
    provenance: Mapping[str, Any]

    def get(self, left: str, right: str, task: str) -> PairSignals:
        """Signals of (left, right) on `task`.

        Raises:
            PlanError: the checkpoint or the task is not in the table, or both checkpoints are the same.
        """
        if row := self.rows.get((left, right, task)):
            return row
        for name in (left, right):
            if name not in self.checkpoint_ids:
                raise PlanError(unknown_name("checkpoint", name, self.checkpoint_ids))
        if task not in self.tasks:
            raise PlanError(unknown_name("task", task, self.tasks))
        raise PlanError(f"left and right are both {left!r}; a pair needs two different checkpoints")

    @property
    def checkpoint_ids(self) -> tuple[str, ...]:
        return tuple(sorted({key[0] for key in self.rows}))

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(sorted({key[2] for key in self.rows}))

    def pair_tasks(self, left: str, right: str) -> tuple[str, ...]:
        """Tasks of the table that the pair was fine-tuned for, sorted; all tasks where that is not known."""
        own = {self.provenance["own_task"].get(name) for name in (left, right)}
        return tuple(task for task in self.tasks if task in own) or self.tasks

    def write(self, uri: str | Path) -> None:
        """Write as Parquet: columns left, right, task and one per feature; provenance in the file's metadata."""
        keys = sorted(self.rows)
        columns: dict[str, list[Any]] = {
            name: [key[index] for key in keys] for index, name in enumerate(("left", "right", "task"))
        }
        for column in self.columns:
            columns[column] = [self.rows[key].features[column] for key in keys]
        meta = json.dumps({"schema": FEATURE_SCHEMA, "columns": self.columns, "provenance": self.provenance})
        table = pa.table(columns).replace_schema_metadata({"simmerge_ray": meta})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_once(uri, buffer.getvalue())


def read_signal_table(uri: str | Path) -> SignalTable:
    """Read a table written by `SignalTable.write`.

    Raises:
        ConfigError: no such file, not such a table, or one of another feature schema.
    """
    try:
        table = pq.read_table(io.BytesIO(read_bytes(uri)))
        meta = json.loads((table.schema.metadata or {})[b"simmerge_ray"])
    except FileNotFoundError:
        raise ConfigError(f"no signal table at {uri}; `simmerge signals` makes one") from None
    except (pa.ArrowInvalid, KeyError, ValueError):
        raise ConfigError(f"{uri} is not a signal table") from None
    if meta["schema"] != FEATURE_SCHEMA:
        raise ConfigError(
            f"{uri} has feature schema {meta['schema']}, this version reads {FEATURE_SCHEMA}; compute it again"
        )
    columns = tuple(meta["columns"])
    rows = {}
    for row in table.to_pylist():
        features = {column: row[column] for column in columns}
        rows[row["left"], row["right"], row["task"]] = PairSignals(row["left"], row["right"], row["task"], features)
    return SignalTable(columns, rows, meta["provenance"])


def signal_units(catalogue: Catalogue, batches: Mapping[str, Sequence[TokenBatch]]) -> list[Unit]:
    """The units of work in their fixed order: the micro-batches of every task, then every tensor by name."""
    probe_units = [("probe", batch) for task in sorted(batches) for batch in batches[task]]
    return probe_units + [("weight", name) for name in read_headers(catalogue.checkpoints[0])]


def tokenize_probes(
    catalogue: Catalogue, probe_sets: Mapping[str, ProbeSet], batch_size: int, max_tokens: int
) -> dict[str, list[TokenBatch]]:
    """Micro-batches of every task, by the catalogue's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(catalogue.checkpoints[0].path, local_files_only=True)
    return {task: probes.token_batches(tokenizer, batch_size, max_tokens) for task, probes in probe_sets.items()}


def compute_signals(
    catalogue: Catalogue,
    probe_sets: Mapping[str, ProbeSet],
    batch_size: int = 16,
    max_tokens: int = 256,
    executor: Executor | None = None,
) -> SignalTable:
    """Signals of all ordered pairs of a catalogue on every probe set.

    Args:
        executor: where units run; None runs them here, one after the other. The result has the same bits either way.

    Raises:
        CheckpointError, ProbeError: an input that cannot be used, named in the message.
        ConfigError: fewer than two checkpoints, or no probes.
    """
    if len(catalogue.checkpoints) < 2:
        raise ConfigError(f"signals need at least two checkpoints, the catalogue has {len(catalogue.checkpoints)}")
    if not probe_sets:
        raise ConfigError("signals need at least one probe set")
    batches = tokenize_probes(catalogue, probe_sets, batch_size, max_tokens)
    units = signal_units(catalogue, batches)
    run = executor or local_executor(catalogue)
    results: list[Any] = [None] * len(units)
    for index, result in run(units):
        results[index] = result
    provenance = {
        "checkpoints": catalogue.digests(),
        "base": catalogue.base.id if catalogue.base else None,
        "own_task": dict(catalogue.own_task),
        "probes": {task: probes.digest for task, probes in sorted(probe_sets.items())},
        "weights": "exact",
    }
    return _assemble(catalogue, batches, units, results, provenance)


def local_executor(catalogue: Catalogue) -> Executor:
    """Runs units in this process."""
    from simmerge_ray.signals.worker import SignalWorker

    worker = SignalWorker(catalogue.checkpoints, catalogue.base)

    def run(units: Sequence[Unit]) -> Iterator[tuple[int, Any]]:
        for index, (kind, payload) in enumerate(units):
            yield index, worker.run_unit(kind, payload)

    return run


def _assemble(
    catalogue: Catalogue,
    batches: Mapping[str, Sequence[TokenBatch]],
    units: Sequence[Unit],
    results: Sequence[Any],
    provenance: Mapping[str, Any],
) -> SignalTable:
    columns = feature_columns(with_base=catalogue.base is not None)
    weights = _weight_matrices(
        ((name, result) for (kind, name), result in zip(units, results, strict=True) if kind == "weight"),
        centre_is_base=catalogue.base is not None,
    )
    rows: dict[tuple[str, str, str], PairSignals] = {}
    start = 0
    for task in sorted(batches):
        matrices = weights | _probe_matrices(results[start : start + len(batches[task])])
        start += len(batches[task])
        for i, left in enumerate(catalogue.ids):
            for j, right in enumerate(catalogue.ids):
                if i != j:
                    features = {column: _entry(matrices, column, i, j) for column in columns}
                    rows[left, right, task] = PairSignals(left, right, task, features)
    return SignalTable(columns, rows, provenance)


def _entry(matrices: Mapping[str, Any], column: str, i: int, j: int) -> float:
    if column in matrices:
        value = float(matrices[column][i, j])
    elif column.startswith("kl_rl_"):
        value = float(matrices[column.replace("kl_rl_", "kl_lr_")][j, i])
    else:  # single-checkpoint values are kept once, in row i
        name, side = column.rsplit("_", 1)
        row = i if side == "left" else j
        value = float(matrices[name][row, 0])
    assert math.isfinite(value), (column, i, j, value)
    return value


def _probe_matrices(units: Sequence[Any]) -> dict[str, Any]:
    """(M, M) matrices of the probe signals of one task, from its micro-batches in order."""
    import torch

    kl = torch.cat([unit.kl for unit in units])
    matrices: dict[str, Any] = {"kl_lr_mean": kl.mean(0)}
    # numpy: torch.quantile refuses more than 2^24 values.
    for name, level in (("q10", 0.1), ("median", 0.5), ("q90", 0.9)):
        matrices[f"kl_lr_{name}"] = np.quantile(kl.numpy(), level, axis=0)
    for name in ("activation", "attention"):
        moments = getattr(units[0], name)
        for unit in units[1:]:
            moments = moments + getattr(unit, name)
        matrices |= {f"{name}_cosine_{statistic}": value for statistic, value in moments.finish().items()}
    matrices["entropy"] = (sum(unit.entropy for unit in units) / len(kl))[:, None]
    matrices["loss"] = (sum(unit.loss for unit in units) / sum(unit.num_losses for unit in units))[:, None]
    return matrices


def _weight_matrices(units: Iterable[tuple[str, Any]], centre_is_base: bool) -> dict[str, Any]:
    """(M, M) matrices of the weight signals, over all tensors and per kind; a kind without tensors is as global."""
    from simmerge_ray.signals.weights import TENSOR_KINDS, tensor_kind

    sums: dict[str, Any] = {}
    for name, unit in units:
        for group in ("global", tensor_kind(name)):
            sums[group] = sums[group] + unit if group in sums else unit
    matrices: dict[str, Any] = {}
    for group in ("global", *TENSOR_KINDS):
        signals = sums.get(group, sums["global"]).finish(centre_is_base)
        for signal, matrix in signals.items():
            prefix = f"weight_{signal}" if signal in ("cosine", "l2") else signal
            matrices[f"{prefix}_{group}"] = matrix
        if group == "global" and "task_vector_norm" in signals:
            matrices["task_vector_norm"] = signals["task_vector_norm"]
    return matrices
