"""The files of a signal table: one Parquet file, and beside it the parts that were appended since.

`pairs.parquet` is the first table, whole, with its provenance in the metadata. A part, `pairs.parts/<first new
point>-<state>.parquet`, holds what later checkpoints added (a `PairBlock`, a row group for each task), in its metadata
their provenance, and in its name the *state* of the table that it follows: a digest of the state before and of what was
added then, at first of the first file's metadata. So a part is one file, there whole or not at all; no file is changed
by another checkpoint; and once the first file is replaced, old parts follow nothing and are passed over.
"""

from __future__ import annotations

import io
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simmerge_ray.base.errors import ConfigError, shown_value
from simmerge_ray.base.json_text import parse_json
from simmerge_ray.base.storage import (
    Place,
    as_place,
    delete_objects,
    digest_file,
    digest_json,
    list_objects,
    read_bytes,
    write_atomically,
)
from simmerge_ray.signals.features import FEATURE_SCHEMA
from simmerge_ray.signals.pair_blocks import MemoryBlock, PairBlock, PairColumns, block_pairs, num_rows

_META = "simmerge_ray"
_KEY = ("left", "right", "task")
# Tables of fewer values are read whole at once, and so checked before anything is computed from them.
WHOLE_VALUES = 1 << 24
_KEPT_GROUPS = 1 << 27  # bytes of row groups of all parts, for who asks pair by pair


def parts_directory(uri: str | Place) -> Place:
    """Where the parts of a table lie."""
    place = as_place(uri)
    return place.with_name(f"{place.stem}.parts")


def write_table(uri: str | Place, rows: PairColumns, columns: Sequence[str], provenance: Mapping[str, Any]) -> None:
    """Write the first file, in place of the table that is there; its parts are deleted then."""
    names, order = sorted(rows.points), {name: place for place, name in enumerate(rows.points)}
    at = np.array([order[name] for name in names], dtype=np.int64)
    left, right = np.nonzero(~np.eye(len(names), dtype=bool))
    # By left, right, task.
    key = [np.repeat(np.array(names, dtype=object)[side], len(rows.tasks)) for side in (left, right)]
    found: dict[str, Any] = dict(zip(_KEY, [*key, list(rows.tasks) * len(left)], strict=True))
    for column in columns:
        of_tasks = [rows.matrix(column, task)[at[left], at[right]] for task in rows.tasks]
        found[column] = pa.array(np.stack(of_tasks, 1).ravel(), from_pandas=True)  # NaN becomes null
    meta = {"schema": FEATURE_SCHEMA, "columns": list(columns), "provenance": provenance}
    buffer = io.BytesIO()
    pq.write_table(pa.table(found).replace_schema_metadata({_META: json.dumps(meta)}), buffer)
    parts = list_objects(parts_directory(uri), ".parquet")
    write_atomically(uri, buffer.getvalue())
    delete_objects(parts)


def append_block(
    uri: str | Place, points: Sequence[str], block: MemoryBlock, added: Mapping[str, Mapping[str, Any]]
) -> None:
    """Append a block to the table at `uri`.

    Args:
        points: of the table, in order; those behind the block count for nothing. added: what joins the objects of its
            provenance, by name.

    Raises:
        ConfigError: see `read_table_files`; or the table has not the points that the block follows.
    """
    chain = _read_chain(uri)
    if list(chain.points) != list(points[: block.start]):
        raise ConfigError(f"the signal table {uri} was changed by somebody else; run `simmerge signals` again")
    meta = {"schema": FEATURE_SCHEMA, "points": list(points[block.start : block.stop]), "added": added}
    left, right = (np.array(points, dtype=object)[side] for side in block_pairs(block.start, block.stop))
    buffer = io.BytesIO()
    writer = None
    for task in chain.rows.tasks:
        group = {"left": left, "right": right, "task": np.full(len(left), task, dtype=object)}
        arrays = {name: pa.array(values) for name, values in group.items()}
        arrays |= {name: pa.array(block.column(name, task), from_pandas=True) for name in chain.columns}
        table = pa.table(arrays).replace_schema_metadata({_META: json.dumps(meta)})
        writer = writer or pq.ParquetWriter(
            buffer, table.schema, use_dictionary=list(_KEY), compression={name: "snappy" for name in _KEY}
        )
        writer.write_table(table, row_group_size=max(1, len(left)))
    assert writer is not None
    writer.close()
    write_atomically(parts_directory(uri) / _part_name(block.start, chain.state), buffer.getvalue())


def digest_table(uri: str | Place) -> str:
    """Digest of a table: of the first file's bytes, and of what was appended. Raises as `read_table_files`."""
    chain = _read_chain(uri)
    return digest_json([digest_file(uri), chain.state]) if chain.parts else digest_file(uri)


def read_table_files(uri: str | Place) -> tuple[tuple[str, ...], PairColumns, dict[str, Any]]:
    """Columns, rows and provenance of a table. A large one is read when it is asked for values.

    Raises:
        ConfigError: there is none, or what lies there is none, of another feature schema, or damaged.
    """
    chain = _read_chain(uri)
    rows = chain.rows
    blocks: list[PairBlock] = list(rows.blocks)
    is_small = len(chain.points) ** 2 * len(rows.tasks) * len(rows.columns) <= WHOLE_VALUES
    groups = _Groups()
    for part in chain.parts:
        block = _PartBlock(part, rows.tasks, chain.columns, groups)
        blocks.append(block.whole(chain.points) if is_small else block)
    return chain.columns, PairColumns(chain.points, rows.tasks, rows.columns, blocks), chain.provenance


@dataclass(frozen=True)
class _Part:
    place: Place
    start: int
    stop: int
    metadata: pq.FileMetaData


@dataclass(frozen=True)
class _Chain:
    """A first file and what follows it. rows: of the first file."""

    columns: tuple[str, ...]
    rows: PairColumns
    points: tuple[str, ...]
    provenance: dict[str, Any]
    state: str
    parts: tuple[_Part, ...]


def _part_name(start: int, state: str) -> str:
    return f"{start:07d}-{state}.parquet"


def _read_chain(uri: str | Place) -> _Chain:
    columns, rows, provenance = _read_first(uri)
    directory = parts_directory(uri)
    names = {as_place(name).name for name in list_objects(directory, ".parquet")}
    points, parts = list(rows.points), []
    state = digest_json([FEATURE_SCHEMA, columns, provenance])
    while (name := _part_name(len(points), state)) in names:
        start, place = len(points), directory / name
        try:
            metadata = _footer(place)
            meta = parse_json(metadata.metadata[_META.encode()])
            points += meta["points"]
            groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            if groups != [num_rows(start, len(points))] * len(rows.tasks) or len(set(points)) < len(points):
                raise ValueError(f"{groups} rows of {len(points) - start} checkpoints")
            for part, values in meta["added"].items():
                provenance = provenance | {part: {**provenance[part], **values}}
            parts.append(_Part(place, start, len(points), metadata))
            state = digest_json([state, meta["points"], meta["added"]])
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(place, error) from None
    return _Chain(columns, rows, tuple(points), provenance, state, tuple(parts))


def _damaged(place: str | Place, error: Exception) -> ConfigError:
    told = f"{type(error).__name__}: {str(error)[:200]}"
    return ConfigError(f"the signal table {place} is damaged ({told}); delete it and compute it again")


def _opened(place: Place, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """Raises OSError, ArrowException."""
    source = str(place) if isinstance(place, Path) else io.BytesIO(read_bytes(place))
    return pq.ParquetFile(source, metadata=metadata)


def _footer(place: Place) -> pq.FileMetaData:
    with _opened(place) as file:
        return file.metadata


class _Groups:
    """Row groups that were read last, of all parts of a table, up to `_KEPT_GROUPS`."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, str], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, str], read: Callable[[], np.ndarray]) -> np.ndarray:
        with self._lock:
            if (found := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return found
        found = read()
        with self._lock:
            self._kept[key] = found
            while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > _KEPT_GROUPS:
                self._kept.popitem(last=False)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return _Groups, ()


class _PartBlock:
    """A part that is read when it is asked. Raises ConfigError then: it is damaged, or is there no more."""

    def __init__(self, part: _Part, tasks: Sequence[str], columns: Sequence[str], groups: _Groups) -> None:
        self.start, self.stop = part.start, part.stop
        self._part, self._tasks, self._columns, self._groups = part, tuple(tasks), tuple(columns), groups

    def column(self, column: str, task: str) -> np.ndarray:
        return self._read([column], task)[0]

    def rows(self, places: np.ndarray, columns: Sequence[str], task: str) -> np.ndarray:
        values = self._groups.get((self.start, task), lambda: self._read(self._columns, task))
        wanted = np.array([self._columns.index(one) for one in columns], dtype=np.int64)
        return values[np.ix_(wanted, places)]

    def whole(self, points: Sequence[str]) -> MemoryBlock:
        """All of it in memory, its pairs checked."""
        expected = [np.array(points, dtype=object)[side] for side in block_pairs(self.start, self.stop)]
        with _opened(self._part.place, self._part.metadata) as file:
            for group, task in enumerate(self._tasks):
                told = file.read_row_group(group, list(_KEY))
                sides = [told[name].to_numpy() for name in ("left", "right")]
                same = all(np.array_equal(one, other) for one, other in zip(sides, expected, strict=True))
                if not same or set(told["task"].to_pylist()) != {task}:
                    raise _damaged(self._part.place, ValueError("its pairs are others"))
        values = {task: self._read(self._columns, task) for task in self._tasks}
        return MemoryBlock(self.start, self.stop, self._columns, values)

    def _read(self, columns: Sequence[str], task: str) -> np.ndarray:
        place = self._part.place
        try:
            with _opened(place, self._part.metadata) as file:
                found = file.read_row_group(self._tasks.index(task), list(columns))
                return np.stack([_values(found[column], column) for column in columns])
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise _damaged(place, error) from None


def _values(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """(R,) float64, NaN where there is no value. Raises TypeError: a value is no finite number."""
    if not pa.types.is_float64(column.type):
        if column.null_count == len(column):
            return np.full(len(column), np.nan)
        raise TypeError(f"the column {name[:80]} is of {column.type}")
    values = column.to_numpy()
    if np.isfinite(values).sum() + column.null_count != len(values):
        raise TypeError(f"a signal of the column {name[:80]} is not a finite number")
    return np.asarray(values)


def _read_first(uri: str | Place) -> tuple[tuple[str, ...], PairColumns, dict[str, Any]]:
    """Columns, rows and provenance of a first file."""
    try:
        content = read_bytes(uri)
    except FileNotFoundError:
        raise ConfigError(f"no signal table at {uri}; `simmerge signals` makes one") from None
    except OSError as error:
        raise ConfigError(f"cannot read the signal table {uri}: {error.strerror}") from None
    try:
        table = pq.read_table(io.BytesIO(content))
        meta = parse_json((table.schema.metadata or {})[_META.encode()])
        schema = meta["schema"]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        raise ConfigError(f"{uri} is not a signal table") from None
    if schema != FEATURE_SCHEMA:
        raise ConfigError(
            f"{uri} has feature schema {shown_value(schema)}, this version reads {FEATURE_SCHEMA}; compute it again"
        )
    try:
        return _first_of(table, meta)
    except (pa.ArrowException, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        told = f"{type(error).__name__}: {str(error)[:200]}"
        raise ConfigError(f"the signal table {uri} is damaged ({told}); compute it again") from None


def _first_of(table: pa.Table, meta: Mapping[str, Any]) -> tuple[tuple[str, ...], PairColumns, dict[str, Any]]:
    """Raises what a damaged one raises: a part is missing, or of another kind."""
    columns, provenance = tuple(meta["columns"]), meta["provenance"]
    if not all(isinstance(part, dict) for part in (provenance, provenance["own_task"])):
        raise TypeError("its provenance is no object")
    base, own = provenance.get("base"), provenance["own_task"].values()
    keys = [table[name].to_pylist() for name in _KEY]
    for name in (*columns, *(one for one in (base, *own) if one is not None), *(one for side in keys for one in side)):
        if not isinstance(name, str):
            raise TypeError(f"a name is {shown_value(name)}")
    points = sorted({*keys[0], *keys[1]}, key=lambda name: (name != base, name))
    tasks = sorted(set(keys[2]))
    order, of_task = ({name: place for place, name in enumerate(names)} for names in (points, tasks))
    left, right = (np.array([order[name] for name in side], dtype=np.int64) for side in keys[:2])
    at_task = np.array([of_task[name] for name in keys[2]], dtype=np.int64)
    differ = left != right
    place = np.full((len(tasks), len(points), len(points)), -1, dtype=np.int64)
    place[at_task[differ], left[differ], right[differ]] = np.flatnonzero(differ)
    all_left, all_right = block_pairs(0, len(points))
    rows = place[:, all_left, all_right]  # (T, R)
    if (rows < 0).any():
        task, pair = np.argwhere(rows < 0)[0]
        missing = points[all_left[pair]], points[all_right[pair]], tasks[task]
        raise ValueError(f"there is no row of {shown_value(missing)}")
    values = np.array([_values(table[column], column) for column in columns]).reshape(len(columns), len(left))
    blocks = [MemoryBlock(0, len(points), columns, {task: values[:, rows[i]] for i, task in enumerate(tasks)})]
    return columns, PairColumns(points, tasks, columns, blocks), provenance
