"""The table of pair signals; its files are those of `table_files`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from simmerge_ray.base.errors import PlanError, unknown_name
from simmerge_ray.base.storage import Place
from simmerge_ray.signals.pair_blocks import Key, PairColumns, PairSignals, packed
from simmerge_ray.signals.table_files import read_table_files, write_table


@dataclass(frozen=True)
class SignalTable:
    """Signals of every ordered pair and task of a catalogue; `provenance` says from what they were computed.

    rows: by (left, right, task), pairs with the base included; these lack the columns of task vectors. Whatever mapping
    is given becomes `PairColumns`. One that was read from large files reads them when it is asked.
    """

    columns: tuple[str, ...]
    rows: Mapping[Key, PairSignals]
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.rows, PairColumns):
            object.__setattr__(self, "rows", packed(self.rows, self.columns, self.provenance.get("base")))

    @property
    def by_columns(self) -> PairColumns:
        """The rows, as what they are kept in."""
        assert isinstance(self.rows, PairColumns)
        return self.rows

    def get(self, left: str, right: str, task: str) -> PairSignals:
        """Signals of two checkpoints of the catalogue on `task`.

        Raises:
            PlanError: the checkpoint or the task is not in the table, or both checkpoints are the same.
        """
        self.check((left, right), task)
        if left == right:
            raise PlanError(f"left and right are both {left!r}; a pair needs two different checkpoints")
        return self.rows[left, right, task]

    def values_of(self, pairs: Sequence[tuple[str, str]], task: str, columns: Sequence[str]) -> np.ndarray:
        """(F, N) of some columns for N pairs at once, the numbers of `get`; raises as it does."""
        self.check({name for pair in pairs for name in pair}, task)
        if same := next((left for left, right in pairs if left == right), None):
            raise PlanError(f"left and right are both {same!r}; a pair needs two different checkpoints")
        return self.by_columns.values_of(pairs, task, columns)

    def matrix(self, column: str, task: str) -> np.ndarray:
        """(K, K) float64 of one column over [base, if any, *checkpoint_ids], left in the row; NaN where there is no
        value: on the diagonal, and of the base's task vector. Not to be written to."""
        matrix = self.by_columns.matrix(column, task)
        if self._order is None:
            return matrix
        return matrix[np.ix_(self._order, self._order)]

    def single(self, signal: str, task: str) -> dict[str, float]:
        """A signal of single checkpoints, such as `loss`, by id."""
        ids = self.checkpoint_ids
        others = (*ids[1:2], *[ids[0]] * (len(ids) - 1))  # a checkpoint's own value stands on the left of any pair
        return {
            one: self.rows[one, other, task].features[f"{signal}_left"] for one, other in zip(ids, others, strict=True)
        }

    @cached_property
    def _order(self) -> np.ndarray | None:
        """Places of [base, *checkpoint_ids] among the points; None where they stand so."""
        points, base = self.by_columns.points, self.provenance.get("base")
        wanted = [*([base] if base in points else []), *self.checkpoint_ids]
        return None if wanted == list(points) else np.array([points.index(name) for name in wanted], dtype=np.int64)

    def check(self, checkpoints: Iterable[str], task: str) -> None:
        """Raises PlanError for what is not in the table."""
        for name in checkpoints:
            if name not in self._known:
                raise PlanError(unknown_name("checkpoint", name, self.checkpoint_ids))
        if task not in self.tasks:
            raise PlanError(unknown_name("task", task, self.tasks))

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.checkpoint_ids)

    @cached_property
    def checkpoint_ids(self) -> tuple[str, ...]:
        """Sorted, the base not included."""
        return tuple(sorted(set(self.by_columns.points) - {self.provenance.get("base")}))

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        return self.by_columns.tasks

    def pair_tasks(self, left: str, right: str) -> tuple[str, ...]:
        """Tasks of the table that the pair was fine-tuned for, sorted; all tasks where that is not known."""
        own = {self.provenance["own_task"].get(name) for name in (left, right)}
        return tuple(task for task in self.tasks if task in own) or self.tasks

    def write(self, uri: str | Place) -> None:
        """Write as Parquet, in place of the table that is there: columns left, right, task and one per feature;
        provenance in the file's metadata. Where a pair has no such feature (the base has no task vector) the cell is
        null."""
        write_table(uri, self.by_columns, self.columns, self.provenance)


def read_signal_table(uri: str | Place) -> SignalTable:
    """Read a table: what `SignalTable.write` wrote, and what was appended to it.

    Raises:
        ConfigError: no such file, not such a table, or one of another feature schema.
    """
    return SignalTable(*read_table_files(uri))
