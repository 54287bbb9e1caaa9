"""Backup files of an event log, written whole or not at all and checked when read."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import BigInteger, Connection, Float, Integer, LargeBinary, select

from simmerge_ray.base.errors import ConfigError, OutputError, StoreError, first_line
from simmerge_ray.base.json_text import parse_json
from simmerge_ray.service.log.database import SCHEMA_VERSION, events, log_head

FORMAT = "1"  # of the Parquet files
_BATCH = 5000
_COLUMNS = [column.name for column in events.c]


def read_backup(path: Path) -> tuple[dict[str, int], Iterator[list[dict[str, Any]]]]:
    """Heads by namespace, and all rows in order.
    Raises (also while rows are taken) ConfigError: no whole backup that this program can read.
    """
    return _read_parquet(path) if _is_parquet(path) else _read_sqlite(path)


def _schema() -> pa.Schema:
    types = {Integer: pa.int32(), BigInteger: pa.int64(), Float: pa.float64(), LargeBinary: pa.binary()}
    return pa.schema([(column.name, types.get(type(column.type), pa.string())) for column in events.c])


def write_rows(connection: Connection, target: Path, namespace: str | None) -> dict[str, int]:
    """All columns of all events, by namespace and number, as Parquet; heads."""
    query, heads_query = select(events), select(log_head.c.namespace, log_head.c.seq)
    if namespace is not None:
        query = query.where(events.c.namespace == namespace)
        heads_query = heads_query.where(log_head.c.namespace == namespace)
    heads = {name: int(seq) for name, seq in connection.execute(heads_query.order_by(log_head.c.namespace))}
    about = {"simmerge_format": FORMAT, "simmerge_schema": SCHEMA_VERSION, "simmerge_heads": json.dumps(heads)}
    schema = _schema().with_metadata(about)
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
    with pq.ParquetWriter(target, schema, **options) as writer:
        streaming = connection.execution_options(stream_results=True, max_row_buffer=_BATCH)
        for rows in streaming.execute(query.order_by(events.c.namespace, events.c.seq)).partitions(_BATCH):
            writer.write_table(pa.Table.from_pylist([row._asdict() for row in rows], schema))
    return heads


def _is_parquet(path: Path) -> bool:
    try:
        with open(path, "rb") as stream:
            return stream.read(4) == b"PAR1"
    except OSError as error:
        raise ConfigError(f"the backup {path} cannot be read: {error.strerror}") from None


def _read_parquet(path: Path) -> tuple[dict[str, int], Iterator[list[dict[str, Any]]]]:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"the backup {path} cannot be read: {first_line(error)}") from None
    about = {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}
    if about.get("simmerge_format") != FORMAT:
        raise ConfigError(f"{path} is no backup of an event log that this program can read")
    _check_version(path, about.get("simmerge_schema"))

    def batches() -> Iterator[list[dict[str, Any]]]:
        try:
            for batch in file.iter_batches(_BATCH):
                yield batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"the backup {path} is damaged: {first_line(error)}") from None

    return parse_json(about["simmerge_heads"]), batches()


def _read_sqlite(path: Path) -> tuple[dict[str, int], Iterator[list[dict[str, Any]]]]:
    if path.with_name(path.name + "-wal").exists():
        raise ConfigError(f"{path} is a database in use; take a backup of it with `simmerge db backup`")
    try:
        with _opened(path) as connection:
            if (said := connection.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
                raise ConfigError(f"the backup {path} is damaged: {said}")
            found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error as error:
        raise ConfigError(f"{path} is no backup of an event log: {error}") from None
    _check_version(path, found and found[0])

    def batches() -> Iterator[list[dict[str, Any]]]:
        with _opened(path) as connection:
            cursor = connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM events ORDER BY namespace, seq")
            while rows := cursor.fetchmany(_BATCH):
                yield [dict(zip(_COLUMNS, row, strict=True)) for row in rows]

    return heads_of_copy(path), batches()


def heads_of_copy(path: Path) -> dict[str, int]:
    """Of a file that `copy_sqlite` wrote: the number of the last event, by namespace."""
    with _opened(path) as connection:
        return dict(connection.execute("SELECT namespace, seq FROM log_head ORDER BY namespace"))


def _opened(path: Path) -> closing[sqlite3.Connection]:
    return closing(sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1", uri=True))


def _check_version(path: Path, found: str | None) -> None:
    if found != SCHEMA_VERSION:
        raise ConfigError(f"the backup {path} has the schema version {found}; this program reads {SCHEMA_VERSION}")


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A temporary sibling, which takes the name when the block ends without an error and its bytes are on disk."""
    if target.exists():
        raise OutputError(f"{target} exists already")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.touch(exist_ok=False)
        yield partial
        for place in (partial, None):
            if place is None:
                os.replace(partial, target)
            descriptor = os.open(place or target.parent, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def copy_sqlite(source: str, target: Path) -> None:
    """One state of a database that is in use. Raises StoreError."""
    with closing(sqlite3.connect(source)) as there, closing(sqlite3.connect(target)) as here:
        there.backup(here, pages=4096)
        # Opening it switches back to the write-ahead log; until then it is a single file.
        here.execute("PRAGMA journal_mode=DELETE").close()
        if (said := here.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
            raise StoreError(f"the backup is damaged, and so probably is the database: {said}")
