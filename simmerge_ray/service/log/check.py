"""Whether a service could start with a log: every event read, and the whole log folded, without a selector."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sqlalchemy import select, text

from simmerge_ray.base.errors import StoreError
from simmerge_ray.base.storage import digest_bytes
from simmerge_ray.service.log.database import RESTORE, snapshots, store_errors
from simmerge_ray.service.log.event_log import EventLog
from simmerge_ray.service.log.fold import Basis, Encoder, State, basis_of
from simmerge_ray.service.log.maintenance import namespaces_of, opened_database, reading
from simmerge_ray.service.log.snapshots import load

_PAGE = 512


@dataclass(frozen=True)
class LogReport:
    """problems: what keeps a service from starting. notes: snapshots that are damaged, which services ignore."""

    namespace: str
    num_events: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def check_database(url: str) -> list[LogReport]:
    """Look at all logs of a database. Raises ConfigError: a URL that names none. StoreError: it cannot be read."""
    with opened_database(url) as engine:
        with reading(engine) as connection:
            if engine.dialect.name == "sqlite":
                said = connection.execute(text("PRAGMA quick_check")).scalars().first()
                if said != "ok":
                    raise StoreError(f"the database is damaged: {said}; {RESTORE}")
            names = namespaces_of(connection)
        return [_checked(EventLog(engine, name)) for name in names]


def _checked(log: EventLog) -> LogReport:
    try:
        head = log.head()
        problems: list[str] = []
        basis = Basis()
        try:
            basis = basis_of(log.changes_of_the_past(head))
        except StoreError as error:
            problems.append(str(error))
        encode = _made_up_encoder(basis)
        state: State | None = State(basis, encode)
        last = 0
        while rows := log.tail(last, _PAGE):
            for row in rows:
                try:
                    row.event  # noqa: B018  every field of it is read; the fold takes some
                    if state is not None and not state.apply(row):
                        state = None  # a problem of the basis, which was told
                except StoreError as error:
                    problems.append(str(error))
                    state = None  # what follows cannot be folded, only read
            last = rows[-1].seq
        if state is not None and state.seq != head:
            problems.append(f"the log ends with event {state.seq}, and its head is {head}; {RESTORE}")
        notes = [] if problems else _snapshot_notes(log, basis, encode)
        return LogReport(log.namespace, head, tuple(dict.fromkeys(problems)), tuple(notes))
    finally:
        log.close()


def _made_up_encoder(basis: Basis) -> Encoder:
    """Contexts of the right size and no content: for whether a log can be folded, their values do not count."""
    size = basis.epoch.num_dimensions if basis.epoch else 0
    return lambda epoch, features, keep: (np.zeros(size), 0.0)


def _snapshot_notes(log: EventLog, basis: Basis, encode: Encoder) -> list[str]:
    notes = []
    own = (snapshots.c.namespace == log.namespace, snapshots.c.epoch_seq == basis.epoch_seq)
    with store_errors("reading snapshots"), log.engine.connect() as connection:
        for row in connection.execute(select(snapshots).where(*own).order_by(snapshots.c.seq)):
            try:
                if digest_bytes(row.data) != row.checksum:
                    raise StoreError("its checksum is wrong")
                load(row.data, basis, encode)
            except StoreError as error:
                notes.append(f"the snapshot of event {row.seq} is damaged and will be ignored: {error}")
    return notes
