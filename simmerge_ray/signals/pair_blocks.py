"""Rows of a signal table, kept by columns in blocks: what a checkpoint adds is one block, and no old one changes.

Points are the base, if any, and the checkpoints in the order in which they came. The block [a, b) holds, for each task,
the ordered pairs of different points of which at least one is a new one, of a to b - 1, and none is behind b; pairs
stand by rows of their (b, b) matrix. So a row's place follows from its two points, and no row needs to be searched for.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Protocol

import numpy as np

from simmerge_ray.signals.features import swapped_features

KEPT_BYTES = 1 << 30  # of matrices that a table keeps for the next reader
Key = tuple[str, str, str]  # left, right, task


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


class PairBlock(Protocol):
    """Pairs of the new points [start, stop) with each other and with those before; R rows for each task.

    A value that a pair has not is NaN.
    """

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...

    def column(self, column: str, task: str) -> np.ndarray:
        """(R,) float64."""
        ...

    def rows(self, places: np.ndarray, columns: Sequence[str], task: str) -> np.ndarray:
        """(F, N) float64 of the rows at N places."""
        ...


@dataclass(frozen=True, eq=False)
class MemoryBlock:
    """values: (F, R) float64 of each task, rows as `columns`."""

    start: int
    stop: int
    columns: tuple[str, ...]
    values: Mapping[str, np.ndarray]

    def column(self, column: str, task: str) -> np.ndarray:
        values: np.ndarray = self.values[task][self.columns.index(column)]
        return values

    def rows(self, places: np.ndarray, columns: Sequence[str], task: str) -> np.ndarray:
        values: np.ndarray = self.values[task][:, places]
        return values if tuple(columns) == self.columns else values[[self.columns.index(one) for one in columns]]


def num_rows(start: int, stop: int) -> int:
    """R of a block."""
    return stop * (stop - 1) - start * (start - 1)


def row_place(start: int, stop: int, left: int, right: int) -> int:
    """Where a pair of a block stands."""
    if left < start:
        return left * (stop - start) + right - start
    return start * (stop - start) + (left - start) * (stop - 1) + right - (right > left)


def block_pairs(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Left and right of all rows of a block, (R,) int64."""
    old = np.indices((start, stop - start)).reshape(2, -1) + np.array([[0], [start]])
    new = np.indices((stop - start, stop)).reshape(2, -1) + np.array([[start], [0]])
    left, right = np.concatenate([old, new[:, new[0] != new[1]]], axis=1)
    return left, right


class PairColumns(Mapping[Key, PairSignals]):
    """Rows by (left, right, task), read by columns.

    points: the base first, if any. blocks: in order, of all points without a gap.
    """

    def __init__(
        self, points: Sequence[str], tasks: Sequence[str], columns: Sequence[str], blocks: Sequence[PairBlock]
    ) -> None:
        self.points, self.tasks, self.columns, self.blocks = tuple(points), tuple(tasks), tuple(columns), tuple(blocks)
        self._place = {name: place for place, name in enumerate(self.points)}
        self._stops = [block.stop for block in self.blocks]
        self._kept: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return PairColumns, (self.points, self.tasks, self.columns, self.blocks)  # without lock and what is kept

    def matrix(self, column: str, task: str) -> np.ndarray:
        """(K, K) float64 of one column over `points`, left in the row; NaN where there is no value. Not to be written
        to: it is kept for the next who asks, up to `KEPT_BYTES` of all."""
        with self._lock:
            if (found := self._kept.get((column, task))) is not None:
                self._kept.move_to_end((column, task))
                return found
        matrix = np.full((len(self.points), len(self.points)), np.nan)
        for block in self.blocks:
            _spread(matrix, block.start, block.stop, block.column(column, task))
        matrix.flags.writeable = False
        with self._lock:
            self._kept[column, task] = matrix
            while len(self._kept) > max(1, KEPT_BYTES // max(1, matrix.nbytes)):
                self._kept.popitem(last=False)
        return matrix

    def values_of(self, pairs: Sequence[tuple[str, str]], task: str, columns: Sequence[str]) -> np.ndarray:
        """(F, N) float64 of N pairs of different points; a block is read once. Raises KeyError: unknown points."""
        values = np.empty((len(columns), len(pairs)))
        places: dict[int, list[tuple[int, int]]] = {}
        for number, pair in enumerate(pairs):
            i, j = (self._place[name] for name in pair)
            index = bisect_right(self._stops, max(i, j))
            block = self.blocks[index]
            places.setdefault(index, []).append((number, row_place(block.start, block.stop, i, j)))
        for index, found in places.items():
            numbers, rows = np.array(found).T
            values[:, numbers] = self.blocks[index].rows(rows, columns, task)
        return values

    def __getitem__(self, key: Key) -> PairSignals:
        left, right, task = key
        i, j = self._place[left], self._place[right]
        if i == j or task not in self.tasks:
            raise KeyError(key)
        values = self.values_of([(left, right)], task, self.columns)[:, 0].tolist()
        # A NaN is not itself.
        found = {column: value for column, value in zip(self.columns, values, strict=True) if value == value}
        return PairSignals(left, right, task, found)

    def __iter__(self) -> Iterator[Key]:
        return ((left, right, task) for task in self.tasks for left, right in permutations(self.points, 2))

    def __len__(self) -> int:
        return len(self.points) * (len(self.points) - 1) * len(self.tasks)


def _spread(matrix: np.ndarray, start: int, stop: int, values: np.ndarray) -> None:
    """Write the rows of a block into their places of the (K, K) matrix."""
    new, border = stop - start, start * (stop - start)
    matrix[:start, start:stop] = values[:border].reshape(start, new)
    rows = values[border:].reshape(new, stop - 1)
    for row, place in enumerate(range(start, stop)):
        matrix[place, :place] = rows[row, :place]
        matrix[place, place + 1 : stop] = rows[row, place:]


def packed(
    rows: Mapping[Key, PairSignals], columns: Sequence[str], base: str | None, tasks: Sequence[str] | None = None
) -> PairColumns:
    """Rows as columns in one block, points sorted behind the base. Raises KeyError: a row of a pair is missing."""
    names = {name for left, right, _ in rows for name in (left, right)}
    points = sorted(names, key=lambda name: (name != base, name))
    known = tuple(dict.fromkeys([*columns, *(name for row in rows.values() for name in row.features)]))
    found = sorted({task for _, _, task in rows}) if tasks is None else tasks
    pairs = list(permutations(points, 2))
    values = {
        task: np.array([[rows[left, right, task].features.get(one, np.nan) for one in known] for left, right in pairs])
        .reshape(len(pairs), len(known))
        .T.copy()
        for task in found
    }
    return PairColumns(points, found, known, [MemoryBlock(0, len(points), known, values)])
