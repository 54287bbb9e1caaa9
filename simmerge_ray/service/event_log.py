"""The append-only log of one namespace: durable appends in groups, and reads in order.

Numbers are given in the order of commits: a transaction holds the head row of its namespace (SQLite: the write lock)
from before it takes numbers until it has committed. Whoever sees event n therefore sees all before it, now and later,
and a reader that goes on after the last number it saw misses nothing. Numbers have no gaps.

Appends of a process are committed in groups by one thread. While one transaction waits for the disk the next entries
gather, so a group is as large as the disk is slow, and nobody waits for a timer. A thread, because drivers block while
they wait for the disk: an event loop that appends awaits a future and serves others meanwhile.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from sqlalchemy import Connection, Engine, Executable, bindparam, insert, select, text, update
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from simmerge_ray.errors import ConfigError, StoreError
from simmerge_ray.service.database import CHANGES_OF_THE_PAST, events, log_head, store_error, store_errors, writing
from simmerge_ray.service.events import Event
from simmerge_ray.service.fold import EventRow
from simmerge_ray.service.outcomes import MAX_NAME, Entry, Known, Outcome, Status, entry_of, invalid, row_of

MAX_BATCH = 256

# Statements are built once: on the hot path that costs more than the database does.
_ROWS = select(*(events.c[name] for name in EventRow._fields)).where(events.c.namespace == bindparam("namespace"))
_TAIL = _ROWS.where(events.c.seq > bindparam("after"), events.c.seq <= bindparam("last"))
_TAIL = _TAIL.order_by(events.c.seq).limit(bindparam("limit"))
_CHANGES = _ROWS.where(events.c.seq <= bindparam("last"), CHANGES_OF_THE_PAST).order_by(events.c.seq)
_HISTORY = _ROWS.where(events.c.subject == bindparam("subject")).order_by(events.c.seq)
# Two queries: with OR, SQLite would scan for what either index finds at once.
_WITH_KEYS = _ROWS.where(events.c.idempotency_key.in_(bindparam("names", expanding=True)))
_WITH_SUBJECTS = _ROWS.where(events.c.subject.in_(bindparam("names", expanding=True)))
_HEAD = select(log_head.c.seq).where(log_head.c.namespace == bindparam("namespace"))
_LOCKED_HEAD = _HEAD.with_for_update()
_FIRST = text("INSERT INTO log_head (namespace, seq) VALUES (:namespace, 0) ON CONFLICT DO NOTHING")
_TAKE = update(log_head).where(log_head.c.namespace == bindparam("own")).values(seq=log_head.c.seq + bindparam("count"))
_TAKE_NUMBERS = _TAKE.returning(log_head.c.seq)
_INSERT = insert(events)
_NO_LIMIT = 2**63 - 1


class EventLog:
    """Events of one namespace. Threads may share it; `close` it at the end.

    Args:
        engine: from `database.open_database`. clock: seconds since 1970, written into events and compared with the
            time to live of decisions; order never depends on it.
    """

    def __init__(self, engine: Engine, namespace: str = "default", clock: Callable[[], float] = time.time) -> None:
        if not 0 < len(namespace) <= MAX_NAME:
            raise ConfigError(f"the namespace {namespace[:40]!r} must have 1 to {MAX_NAME} characters")
        self.engine, self.namespace = engine, namespace
        self._clock = clock
        self._queue: queue.SimpleQueue[tuple[Entry, Future[Outcome]] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._writer = threading.Thread(target=self._write, name=f"event-log-{namespace}", daemon=True)
        self._writer.start()

    def submit(self, event: Event, key: str | None = None, payload: Any = None) -> Future[Outcome]:
        """Append an event; the future is done when its transaction is committed, or the event is refused.

        Args:
            key: idempotency key: the second append with it answers with the first one's event. payload: JSON that a
                retry repeats, where the event itself differs from try to try; None: the event.

        Raises (here): ConfigError, ValueError: a key or name that does not fit, or JSON with NaN. StoreError: closed.
        Raises (by the future): StoreError: nothing of this event is in the log, except where the connection broke
            during the commit and nobody can know; a retry with the same key is safe either way.
        """
        future: Future[Outcome] = Future()
        if (refusal := invalid(event)) is not None:
            future.set_result(refusal)
            return future
        entry = entry_of(event, self._clock(), key, payload)
        with self._closing:
            if self._closed:
                raise StoreError("the event log is closed")
            self._queue.put((entry, future))
        return future

    def append(self, event: Event, key: str | None = None, payload: Any = None) -> Outcome:
        """`submit`, and wait."""
        return self.submit(event, key, payload).result()

    async def append_async(self, event: Event, key: str | None = None, payload: Any = None) -> Outcome:
        """`submit`, and let other tasks run meanwhile."""
        return await asyncio.wrap_future(self.submit(event, key, payload))

    def head(self) -> int:
        """Number of the last event; 0 in an empty log. Raises StoreError."""
        with store_errors("reading the event log"), self.engine.connect() as connection:
            return connection.execute(_HEAD, {"namespace": self.namespace}).scalar() or 0

    def tail(self, after: int, limit: int, last: int = _NO_LIMIT) -> list[EventRow]:
        """At most `limit` events that follow number `after`, in order, up to number `last`. Raises StoreError."""
        return self._read(_TAIL, after=after, limit=limit, last=last)

    def changes_of_the_past(self, last: int) -> list[EventRow]:
        """Voids and encoder epochs up to number `last`, in order: what a fold knows beforehand. Raises StoreError."""
        return self._read(_CHANGES, last=last)

    def history(self, subject: str) -> list[EventRow]:
        """All events about a decision, arm or epoch, in order. Raises StoreError."""
        return self._read(_HISTORY, subject=subject)

    def close(self) -> None:
        """Commit what was submitted, and stop. The engine stays open."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._writer.join()

    def _read(self, statement: Executable, **values: Any) -> list[EventRow]:
        with store_errors("reading the event log"), self.engine.connect() as connection:
            return self._rows(connection, statement, **values)

    def _rows(self, connection: Connection, statement: Executable, **values: Any) -> list[EventRow]:
        found = connection.execute(statement, {"namespace": self.namespace, **values})
        return list(map(EventRow._make, found.all()))

    def _write(self) -> None:
        """The writer thread: one group after the other."""
        while (first := self._queue.get()) is not None:
            batch, ends = [first], False
            while len(batch) < MAX_BATCH and not ends and not self._queue.empty():
                item = self._queue.get()
                if item is None:
                    ends = True
                else:
                    batch.append(item)
            # Who was cancelled before this point is not in the log; afterwards a future cannot be cancelled.
            self._commit([(entry, future) for entry, future in batch if future.set_running_or_notify_cancel()])
            if ends:
                return

    def _commit(self, batch: Sequence[tuple[Entry, Future[Outcome]]]) -> None:
        """One transaction, then the answers; a failure is that of all its members and of nobody else."""
        if not batch:
            return
        try:
            outcomes = self._transaction([entry for entry, _ in batch])
        except Exception as error:
            if len(batch) > 1 and not isinstance(error, OperationalError):
                for one in batch:  # one event that the database cannot take must not fail the others
                    self._commit([one])
                return
            # Whatever it is, it is told to who waits: this thread lives on.
            known = isinstance(error, SQLAlchemyError)
            for _, future in batch:
                future.set_exception(store_error("appending to the event log", error) if known else error)
        else:
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                future.set_result(outcome)

    def _transaction(self, entries: Sequence[Entry]) -> list[Outcome]:
        """Judge and append entries in their order; committed when this returns."""
        with writing(self.engine) as connection:
            head = self._locked_head(connection)
            known = Known(self._related(connection, entries))
            outcomes: list[Outcome] = []
            created: list[EventRow] = []
            for entry in entries:
                verdict = known.judge(entry)
                if not isinstance(verdict, Outcome):
                    row = row_of(entry, *verdict, head + len(created) + 1)
                    known.add(row)
                    created.append(row)
                    verdict = Outcome(Status.CREATED, row)
                outcomes.append(verdict)
            if created:
                taken = {"own": self.namespace, "count": len(created)}
                last = connection.execute(_TAKE_NUMBERS, taken).scalar_one()
                assert last == created[-1].seq, "the head row was not held"
                rows = [{"namespace": self.namespace, **row._asdict()} for row in created]
                connection.execute(_INSERT, rows)
        return outcomes

    def _locked_head(self, connection: Connection) -> int:
        """Number of the last event, held until the end of the transaction."""
        own = {"namespace": self.namespace}
        head: int | None = connection.execute(_LOCKED_HEAD, own).scalar()
        if head is None:
            connection.execute(_FIRST, own)
            head = connection.execute(_LOCKED_HEAD, own).scalar_one()
        return head

    def _related(self, connection: Connection, entries: Sequence[Entry]) -> list[EventRow]:
        """What the log has with the keys and about the subjects of the entries."""
        keys = [entry.key for entry in entries if entry.key is not None]
        subjects = [entry.subject for entry in entries if entry.subject is not None]
        related: set[EventRow] = set()
        for statement, names in ((_WITH_KEYS, keys), (_WITH_SUBJECTS, subjects)):
            if names:
                related.update(self._rows(connection, statement, names=names))
        return list(related)
