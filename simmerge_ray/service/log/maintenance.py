"""Maintenance of an event log: status, backup and restore, export, and pruning.

A backup is one consistent state of the database, taken while services go on: a copy of SQLite's file, or Parquet with
the rows as they are, which either database can be restored from. A log is restored byte for byte, into namespaces that
are empty. Only arrays of decisions that can never be rewarded are ever thrown away: see `prune`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Connection, Engine, bindparam, delete, func, insert, select, text, update
from sqlalchemy.engine import make_url

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.service.log.backups import copy_sqlite, heads_of_copy, new_file, read_backup, write_rows
from simmerge_ray.service.log.database import (
    FIRST_HEAD,
    SCHEMA_VERSION,
    events,
    log_head,
    make_engine,
    open_database,
    schema_version,
    shown,
    snapshots,
    store_errors,
    upgrade_database,
    writing,
)
from simmerge_ray.service.log.events import DecisionClosed, DecisionMade, EventRow, encode
from simmerge_ray.service.log.fold import Course
from simmerge_ray.service.log.ledger import courses_of, status_of

_PAGE = 256  # decisions whose other events are looked up at once
_NOTHING = np.zeros(0)


@dataclass(frozen=True)
class NamespaceStatus:
    """head: number of the last event. counts: of events by kind. first_at, last_at: seconds since 1970."""

    namespace: str
    head: int
    counts: Mapping[str, int]
    first_at: float | None
    last_at: float | None
    snapshots: tuple[int, ...]
    snapshot_bytes: int


@dataclass(frozen=True)
class DatabaseStatus:
    """schema: version of the tables, None without any. size_bytes: of the whole database."""

    url: str
    schema: str | None
    size_bytes: int
    namespaces: tuple[NamespaceStatus, ...]


def status(url: str) -> DatabaseStatus:
    """What is in a database, whatever the version of its schema.
    Raises ConfigError: a URL that names no database. StoreError: it cannot be read.
    """
    with opened_database(url, make_engine) as engine, reading(engine) as connection:
        schema = schema_version(connection)
        names = namespaces_of(connection) if schema == SCHEMA_VERSION else []
        found = tuple(_namespace(connection, name) for name in names)
        return DatabaseStatus(shown(engine), schema, _size(connection), found)


def _namespace(connection: Connection, name: str) -> NamespaceStatus:
    own = events.c.namespace == name
    head = connection.execute(select(log_head.c.seq).where(log_head.c.namespace == name)).scalar_one()
    kinds = connection.execute(select(events.c.kind, func.count()).where(own).group_by(events.c.kind)).all()
    ends = select(events.c.at).where(own).limit(1)
    first = connection.execute(ends.order_by(events.c.seq)).scalar()
    last = connection.execute(ends.order_by(events.c.seq.desc())).scalar()
    stored = select(snapshots.c.seq, func.length(snapshots.c.data)).where(snapshots.c.namespace == name)
    kept = connection.execute(stored.order_by(snapshots.c.seq)).all()
    counts = {kind: int(count) for kind, count in sorted(kinds)}
    return NamespaceStatus(
        name, head, counts, first, last, tuple(seq for seq, _ in kept), sum(size for _, size in kept)
    )


def _size(connection: Connection) -> int:
    if connection.dialect.name == "postgresql":
        return int(connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one())
    pages = connection.execute(text("PRAGMA page_count")).scalar_one()
    return int(pages * connection.execute(text("PRAGMA page_size")).scalar_one())


def backup(url: str, target: Path) -> dict[str, int]:
    """Write one consistent state of all namespaces to a new file; heads by namespace.

    Args:
        target: a name that ends in `.parquet` takes the rows, from either database; any other a copy of SQLite's file,
            which is a database at once. It appears when it is whole and on disk.

    Raises ConfigError: PostgreSQL and another name. OutputError: the file exists, or cannot be written. StoreError.
    """
    with opened_database(url) as engine:
        if target.suffix == ".parquet":
            with reading(engine) as connection, new_file(target) as partial:
                return write_rows(connection, partial, None)
        if engine.dialect.name != "sqlite":
            raise ConfigError(f"a backup of PostgreSQL is a Parquet file; call it {target.name}.parquet")
        with new_file(target) as partial, store_errors("the backup"):
            copy_sqlite(make_url(url).database or "", partial)
            return heads_of_copy(partial)


def restore(url: str, source: Path) -> dict[str, int]:
    """Fill a database from a backup, all of it or nothing; numbers of events by namespace. It may have no tables yet.
    Raises ConfigError: the file is no whole backup, or a namespace of it has events here. StoreError.
    """
    heads, rows = read_backup(source)
    upgrade_database(url)
    with opened_database(url) as engine, store_errors("restoring the event log"), writing(engine) as connection:
        for name in heads:
            connection.execute(FIRST_HEAD, {"namespace": name})
            held = select(log_head.c.seq).where(log_head.c.namespace == name).with_for_update()
            if connection.execute(held).scalar_one() != 0:
                raise ConfigError(f"the namespace {name!r} of {shown(engine)} has events already")
        counted = dict.fromkeys(heads, 0)
        for batch in rows:
            for row in batch:
                name = row["namespace"]
                if name not in counted or row["seq"] != counted[name] + 1:
                    raise ConfigError(f"{source} is damaged: event {row['seq']} of {name!r} is out of order")
                counted[name] += 1
            connection.execute(insert(events), batch)
        if counted != heads:
            raise ConfigError(f"{source} is damaged: it has {counted} events and names {heads}")
        for name, head in heads.items():
            connection.execute(update(log_head).where(log_head.c.namespace == name).values(seq=head))
    return heads


def export_events(url: str, namespace: str, target: Path) -> int:
    """Write the events of a namespace as they are; how many. The file is a backup of this namespace as well.
    Raises ConfigError: no such namespace. OutputError, StoreError: as `backup`.
    """
    with opened_database(url) as engine, reading(engine) as connection, new_file(target) as partial:
        _check_namespace(connection, namespace)
        return sum(write_rows(connection, partial, namespace).values())


_DECISIONS = pa.schema(
    [
        ("id", pa.string()),
        ("seq", pa.int64()),
        ("at", pa.float64()),
        ("kind", pa.string()),
        ("left", pa.string()),
        ("right", pa.string()),
        ("tasks", pa.list_(pa.string())),
        ("arm", pa.string()),
        ("explored", pa.bool_()),
        ("arms", pa.list_(pa.string())),
        ("propensities", pa.list_(pa.float64())),
        ("propensity", pa.float64()),
        ("utility", pa.float64()),
        ("status", pa.string()),
        ("closed_reason", pa.string()),
        ("expires_at", pa.float64()),
        ("epoch", pa.int64()),
        ("model_version", pa.string()),
    ]
)


def export_decisions(url: str, namespace: str, target: Path, now: float) -> int:
    """Write a table of the decisions, one a row, with their rewards; how many.

    Its columns are in docs/event-log.md.

    now: seconds since 1970; decisions whose time is over are called expired.

    Raises as `export_events`.
    """
    count = 0
    with opened_database(url) as engine, reading(engine) as connection, new_file(target) as partial:
        _check_namespace(connection, namespace)
        with pq.ParquetWriter(partial, _DECISIONS, compression="zstd") as writer:
            for names in _decisions(connection, namespace):
                table = [_flat(course, now) for course in courses_of(connection, namespace, names)]
                writer.write_table(pa.Table.from_pylist(table, _DECISIONS))
                count += len(table)
    return count


def _flat(course: Course[EventRow], now: float) -> dict[str, Any]:
    row = course.decision
    body = json.loads(row.body)
    answer, request = body.get("answer") or {}, body["request"]
    # A plan is drawn by its id, and its label is what the answer calls its arm.
    drawn = dict(zip(body["arms"], body["propensities"], strict=True))
    played = (answer.get("plan") or {}).get("id", body["arm"])
    logged = ("explored", "arms", "propensities", "expires_at", "epoch", "model_version")
    return {
        **{name: body[name] for name in logged},
        **{name: answer.get(name, request.get(name)) for name in ("left", "right", "tasks")},
        "id": body["decision_id"],
        "seq": row.seq,
        "at": row.at,
        "kind": answer.get("kind", "pair"),
        "arm": answer.get("arm", body["arm"]),
        "propensity": drawn.get(played if played in drawn else body["arm"]),
        "utility": course.utility,
        "status": status_of(course, now),
        "closed_reason": course.closed_reason,
    }


@dataclass(frozen=True)
class Pruned:
    """What was deleted."""

    decisions: int
    bytes: int
    snapshots: int


def prune(url: str, namespace: str, before: float, keep_snapshots: int, dry_run: bool = False) -> Pruned:
    """Delete what no fold will ever need, whatever the encoder.

    That is the raw features and the context of decisions that were closed without a reward before a time: no reward of
    them is ever taken, so nothing is learned from them. The events themselves stay, with what was asked, answered and
    drawn; rewarded and open decisions stay whole. Snapshots but the newest go as well.

    before: seconds since 1970, when a decision was closed. dry_run: only count.

    Raises ConfigError: no such namespace. StoreError.
    """
    own = (events.c.namespace == namespace, events.c.kind == DecisionClosed.kind, events.c.at < before)
    changed, freed = 0, 0
    with opened_database(url) as engine:
        with reading(engine) as connection:
            _check_namespace(connection, namespace)
            closed = list(connection.execute(select(events.c.subject).where(*own).order_by(events.c.seq)).scalars())
        for start in range(0, len(closed), _PAGE):
            with store_errors("pruning the event log"), writing(engine) as connection:
                for course in courses_of(connection, namespace, closed[start : start + _PAGE]):
                    if (smaller := _without_arrays(course, before)) is None:
                        continue
                    row, saved = smaller
                    changed, freed = changed + 1, freed + saved
                    if not dry_run:
                        which = (events.c.namespace == namespace, events.c.seq == row.seq)
                        connection.execute(update(events).where(*which).values(body=row.body, data=row.data))
        with store_errors("pruning snapshots"), writing(engine) as connection:
            mine = snapshots.c.namespace == namespace
            kept = select(snapshots.c.seq).where(mine).order_by(snapshots.c.seq.desc())
            old = list(connection.execute(kept).scalars())[keep_snapshots:]
            if old and not dry_run:
                connection.execute(delete(snapshots).where(mine, snapshots.c.seq.in_(old)))
    return Pruned(changed, freed, len(old))


def _without_arrays(course: Course[EventRow], now: float) -> tuple[EventRow, int] | None:
    """The decision without its arrays, and the bytes saved; None where there is nothing to save."""
    decision = course.decision
    if not decision.data or status_of(course, now) not in ("closed", "expired"):
        return None
    body, data = encode(replace(decision.decoded(DecisionMade), features=_NOTHING, z=_NOTHING))
    saved = len(decision.body) + len(decision.data) - len(body) - len(data)
    return decision._replace(body=body, data=data), saved


# Reading the database.


@contextmanager
def opened_database(url: str, open_engine: Callable[[str, bool], Engine] = open_database) -> Iterator[Engine]:
    """An engine for work that may take minutes. Raises ConfigError, StoreError."""
    make_engine(url).dispose()
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").is_file():
        raise ConfigError(f"there is no database file {parsed.database}; `simmerge db upgrade` makes an empty one")
    engine = open_engine(url, True)
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that sees one state of the database from its first query on."""
    with store_errors("reading the event log"), engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection = connection.execution_options(isolation_level="REPEATABLE READ")
        with connection.begin():
            yield connection


def namespaces_of(connection: Connection) -> list[str]:
    """All that a database has a log of."""
    return list(connection.execute(select(log_head.c.namespace).order_by(log_head.c.namespace)).scalars())


def _check_namespace(connection: Connection, namespace: str) -> None:
    if namespace not in (known := namespaces_of(connection)):
        raise ConfigError(f"no namespace {namespace!r} in the database; known: {', '.join(known) or 'none'}")


def _decisions(connection: Connection, namespace: str) -> Iterator[list[str]]:
    """Ids in order, page by page."""
    own = (events.c.namespace == namespace, events.c.kind == DecisionMade.kind)
    after = 0
    query = select(events.c.seq, events.c.subject).where(*own, events.c.seq > bindparam("after"))
    query = query.order_by(events.c.seq).limit(_PAGE)
    while rows := connection.execute(query, {"after": after}).all():
        yield [name for _, name in rows]
        after = rows[-1][0]
