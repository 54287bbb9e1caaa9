"""Texts for probes out of files that people have: text, CSV, JSON, JSONL, Parquet, a Hugging Face data set on disk.

Nothing is asked of the data but a column of prompts. `datasets` is not needed: what its `save_to_disk` writes is Arrow.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simmerge_ray.base.errors import ProbeError, first_line, shown_value, unknown_name
from simmerge_ray.base.json_text import JsonError, parse_json
from simmerge_ray.base.storage import Place, read_bytes, read_jsonl, read_text

FIELDS = ("text", "prompt", "question", "instruction", "input")  # taken where no field is named, the first there is
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_COLUMNAR = (".parquet", ".arrow")
_SPLITS = ("train", "validation", "test")  # of a data set: the first there is


def read_texts(source: Place, field: str | None = None) -> list[str]:
    """Different non-empty texts of a source, in its order.

    Args:
        source: a file, by its suffix: .csv, .tsv, .json (a list of objects), .jsonl, .parquet, .arrow; any other is
            plain text, a prompt a line. A directory is a data set as `save_to_disk` writes it, or Parquet files.
        field: the column of prompts; None takes the first of `FIELDS` that there is.

    Raises ProbeError: it cannot be read, holds no text, or has no such column.
    """
    try:
        texts = _texts(source, field)
    except OSError as error:
        raise ProbeError(f"cannot read {source}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ProbeError(f"{source} cannot be read as text: {str(error)[:200]}") from None
    found = list(dict.fromkeys(text for text in texts if text.strip()))
    if not found:
        raise ProbeError(f"{source} holds no texts")
    return found


def some_of(texts: Sequence[str], count: int) -> list[str]:
    """At most `count` texts, a sample in the order of the texts; always the same one."""
    if len(texts) <= count:
        return list(texts)
    return [texts[index] for index in sorted(random.Random(0).sample(range(len(texts)), count))]


def _texts(source: Place, field: str | None) -> Iterable[str]:
    suffix = source.suffix.lower()
    if source.is_dir():
        return _columnar_texts(source, _data_files(source), field)
    if suffix in _COLUMNAR:
        return _columnar_texts(source, [source], field)
    if suffix in _SEPARATORS:
        reader = csv.DictReader(io.StringIO(read_text(source)), delimiter=_SEPARATORS[suffix])
        return _of_rows(source, list(reader), field)
    if suffix == ".jsonl":
        return _of_rows(source, [row for _, row in read_jsonl(source, ProbeError)], field)
    if suffix == ".json":
        return _of_rows(source, _json_rows(source), field)
    if field is not None:
        raise ProbeError(f"{source} is plain text, a prompt a line; it has no field {shown_value(field)}")
    return [line.rstrip("\r") for line in read_text(source).split("\n")]


def _json_rows(source: Place) -> list[Mapping[str, Any]]:
    try:
        rows = parse_json(read_text(source))
    except JsonError as error:
        raise ProbeError(f"{source}: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ProbeError(f"{source} is no list of objects; one object a line is .jsonl")
    return rows


def _of_rows(source: Place, rows: Sequence[Mapping[str, Any]], field: str | None) -> list[str]:
    if not rows:
        return []
    name = _field(source, list(rows[0]), field)
    return [_text(source, name, row.get(name)) for row in rows]


def _field(source: Place, columns: Sequence[str], field: str | None) -> str:
    """The column of prompts. Raises ProbeError: there is none of that name, or of a usual one."""
    if field is None:
        field = next((name for name in FIELDS if name in columns), None)
        if field is None:
            raise ProbeError(f"{source}: which field holds the prompts? name one with --field: {', '.join(columns)}")
    if field not in columns:
        raise ProbeError(f"{source}: {unknown_name('field', field, columns)}")
    return field


def _text(source: Place, field: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ProbeError(f"{source}: field {field!r} holds {shown_value(value)}; a probe is a text")
    return value


def _data_files(directory: Place) -> list[Place]:
    """Files of a data set on disk, or of the first of its splits."""
    for place in (directory, *(directory / split for split in _SPLITS)):
        for suffix in _COLUMNAR:
            if found := sorted((*place.glob(f"*{suffix}"), *place.glob(f"data/*{suffix}")), key=str):
                return list(found)
    raise ProbeError(
        f"{directory} holds no *.arrow or *.parquet files (a data set as `save_to_disk` writes it, itself or below "
        f"{', '.join(_SPLITS)})"
    )


def _columnar_texts(source: Place, files: Iterable[Place], field: str | None) -> Iterable[str]:
    import pyarrow as pa

    for file in files:
        try:
            table = _table(file)
        except (pa.ArrowException, OSError) as error:
            raise ProbeError(f"cannot read {file}: {first_line(error)}") from None
        name = _field(source, table.column_names, field)
        yield from (_text(source, name, value) for value in table.column(name).to_pylist())


def _table(file: Place) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix.lower() == ".parquet":
        return pq.read_table(io.BytesIO(read_bytes(file)))
    opened: Any = pa.memory_map(str(file)) if isinstance(file, Path) else pa.BufferReader(read_bytes(file))
    try:
        return pa.ipc.open_stream(opened).read_all()  # what `datasets` writes
    except pa.ArrowInvalid:
        return pa.ipc.open_file(opened).read_all()
