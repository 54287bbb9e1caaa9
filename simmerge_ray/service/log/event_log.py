"""The append-only log of one namespace: durable appends in groups, and reads in order.

Numbers are given in the order of commits: a transaction holds the head row of its namespace (SQLite: the write lock)
from before it takes numbers until it has committed. Whoever sees event n therefore sees all before it, now and later,
and a reader that goes on after the last number it saw misses nothing. Numbers have no gaps.

Appends of a process are committed in groups by one thread. While one transaction waits for the disk the next ones
gather, so a group is as large as the disk is slow, and nobody waits for a timer. A thread, because drivers block while
they wait for the disk: an event loop that appends awaits a future and serves others meanwhile.

An event that depends on the state of the log is made by that thread, too, from one look at the log for the whole
group: to wake another thread for the look costs more than the look.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Executable, bindparam, insert, select, union_all, update
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.sql import ClauseElement

from simmerge_ray.base.errors import ConfigError, StoreError
from simmerge_ray.service.log.database import (
    CHANGES_OF_THE_PAST,
    FIRST_HEAD,
    KeptConnection,
    events,
    log_head,
    store_error,
    store_errors,
)
from simmerge_ray.service.log.events import Event, EventRow
from simmerge_ray.service.log.outcomes import MAX_NAME, Known, Outcome, Proposal, Status, invalid, proposal_of
from simmerge_ray.service.log.statements import Statement

MAX_BATCH = 256

# All events of a namespace.
ROWS = select(*(events.c[name] for name in EventRow._fields)).where(events.c.namespace == bindparam("namespace"))
_TAIL = ROWS.where(events.c.seq > bindparam("after"), events.c.seq <= bindparam("last"))
_TAIL = _TAIL.order_by(events.c.seq).limit(bindparam("limit"))
_CHANGES = ROWS.where(events.c.seq <= bindparam("last"), CHANGES_OF_THE_PAST).order_by(events.c.seq)
_HISTORY = ROWS.where(events.c.subject == bindparam("subject")).order_by(events.c.seq)
_HEAD = select(log_head.c.seq).where(log_head.c.namespace == bindparam("namespace"))
_TAKE = update(log_head).where(log_head.c.namespace == bindparam("own")).values(seq=log_head.c.seq + bindparam("count"))
_TAKE_NUMBERS = _TAKE.returning(log_head.c.seq)
_NO_LIMIT = 2**63 - 1


@dataclass(frozen=True)
class _Draft:
    """An event that the writer makes of the state."""

    make: Callable[[Any], Event]
    key: str | None
    payload: Any


@dataclass(frozen=True, eq=False)
class _Waiting:
    """An append. task: what an event loop waits for; threads wait for the future."""

    proposal: Proposal | _Draft
    future: Future[Outcome]
    task: asyncio.Future[Outcome] | None = None


def _related_query(keys: int, subjects: int) -> ClauseElement:
    """Events with one of so many keys, and about one of so many subjects.

    A union: with OR, SQLite would scan for what either index finds at once.
    """
    parts = []
    for name, column, count in (("key", events.c.idempotency_key, keys), ("subject", events.c.subject, subjects)):
        if count:
            parts.append(ROWS.where(column.in_([bindparam(f"{name}{i}", type_=column.type) for i in range(count)])))
    return parts[0] if len(parts) == 1 else union_all(*parts)


class EventLog:
    """Events of one namespace. Threads may share it; `close` it at the end.

    Args:
        engine: from `database.open_database`. clock: seconds since 1970, written into events and compared with the
            time to live of decisions; order never depends on it. look: what `append_made` makes events of, e.g. the
            state that a replica has folded; asked in the writer's thread, so it must not wait for an append.
    """

    def __init__(
        self,
        engine: Engine,
        namespace: str = "default",
        clock: Callable[[], float] = time.time,
        look: Callable[[], Any] | None = None,
    ) -> None:
        if not 0 < len(namespace) <= MAX_NAME:
            raise ConfigError(f"the namespace {namespace[:40]!r} must have 1 to {MAX_NAME} characters")
        self.engine, self.namespace = engine, namespace
        self._clock, self._look = clock, look
        self._writes, self._reads = KeptConnection(engine, writes=True), KeptConnection(engine, writes=False)
        self._tail = Statement(_TAIL, engine.dialect)
        self._take = Statement(_TAKE_NUMBERS, engine.dialect)
        self._insert = Statement(insert(events), engine.dialect)
        self._related_by_count: dict[tuple[int, int], Statement] = {}
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
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
        self._put(_Waiting(proposal_of(event, self._clock(), key, payload), future))
        return future

    def append(self, event: Event, key: str | None = None, payload: Any = None) -> Outcome:
        """`submit`, and wait."""
        return self.submit(event, key, payload).result()

    async def append_async(self, event: Event, key: str | None = None, payload: Any = None) -> Outcome:
        """`submit`, and let other tasks run meanwhile."""
        refusal = invalid(event)
        return refusal or await self._wait_for(proposal_of(event, self._clock(), key, payload))

    async def append_made(self, make: Callable[[Any], Event], key: str | None, payload: Any) -> Outcome:
        """Append the event that `make` makes of what the log's `look` returned after this call.

        Raises: what `look` and `make` raise, and as `submit`.
        """
        return await self._wait_for(_Draft(make, key, payload))

    async def _wait_for(self, proposal: Proposal | _Draft) -> Outcome:
        future: Future[Outcome] = Future()
        task: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._put(_Waiting(proposal, future, task))
        try:
            return await task
        except asyncio.CancelledError:
            future.cancel()
            raise

    def head(self) -> int:
        """Number of the last event; 0 in an empty log. Raises StoreError."""
        with store_errors("reading the event log"), self.engine.connect() as connection:
            return connection.execute(_HEAD, {"namespace": self.namespace}).scalar() or 0

    def tail(self, after: int, limit: int, last: int = _NO_LIMIT) -> list[EventRow]:
        """At most `limit` events that follow number `after`, in order, up to number `last`. Raises StoreError."""
        values = {"namespace": self.namespace, "after": after, "limit": limit, "last": last}
        # In the writer's thread this is the look before decisions are made.
        own = threading.current_thread() is self._writer
        reading = self._reads.transaction if own else self.engine.connect
        with store_errors("reading the event log"), reading() as connection:
            return list(map(EventRow._make, self._tail.run(connection, values)))

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
            found = connection.execute(statement, {"namespace": self.namespace, **values})
            return list(map(EventRow._make, found.all()))

    def _put(self, waiting: _Waiting) -> None:
        with self._closing:
            if self._closed:
                raise StoreError("the event log is closed")
            self._queue.put(waiting)

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
            # Appends cancelled before this point never reach the log; later ones cannot be cancelled.
            going_on = [one for one in batch if one.future.set_running_or_notify_cancel()]
            self._commit(self._made(going_on))
            _wake(going_on)
            if ends:
                break
        self._writes.close()
        self._reads.close()

    def _made(self, batch: Sequence[_Waiting]) -> list[tuple[Proposal, Future[Outcome]]]:
        """Entries and futures, drafts made; one that cannot be made has its answer."""
        made: list[tuple[Proposal, Future[Outcome]]] = []
        seen: Any = None
        failed: Exception | None = None
        if self._look is not None and any(isinstance(one.proposal, _Draft) for one in batch):
            try:
                seen = self._look()
            except Exception as error:  # reported to those that need the look
                failed = error
        for one in batch:
            proposal = one.proposal
            if isinstance(proposal, _Draft):
                try:
                    if failed is not None:
                        raise failed
                    proposal = proposal_of(proposal.make(seen), self._clock(), proposal.key, proposal.payload)
                except Exception as error:
                    one.future.set_exception(error)
                    continue
            made.append((proposal, one.future))
        return made

    def _commit(self, batch: Sequence[tuple[Proposal, Future[Outcome]]]) -> None:
        """One transaction, then the answers; a failure is that of all its members and of nobody else."""
        if not batch:
            return
        try:
            outcomes = self._transaction([proposal for proposal, _ in batch])
        except Exception as error:
            if len(batch) > 1 and not isinstance(error, OperationalError):
                for one in batch:  # one event that the database cannot take must not fail the others
                    self._commit([one])
                return
            # Any error goes to the callers; this thread must survive it.
            known = isinstance(error, SQLAlchemyError)
            for _, future in batch:
                future.set_exception(store_error("appending to the event log", error) if known else error)
        else:
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                future.set_result(outcome)

    def _transaction(self, proposals: Sequence[Proposal]) -> list[Outcome]:
        """Judge and append proposals in their order; committed when this returns."""
        with self._writes.transaction() as connection:
            # Taken before anything is judged: to take them holds the head row, or SQLite's lock, until the commit.
            head = self._taken(connection, len(proposals)) - len(proposals)
            known = Known(self._related(connection, proposals))
            outcomes: list[Outcome] = []
            created: list[EventRow] = []
            for proposal in proposals:
                verdict = known.judge(proposal)
                if not isinstance(verdict, Outcome):
                    row = proposal.row(*verdict, head + len(created) + 1)
                    known.add(row)
                    created.append(row)
                    verdict = Outcome(Status.CREATED, row)
                outcomes.append(verdict)
            if len(created) < len(proposals):
                self._taken(connection, len(created) - len(proposals))
            if created:
                rows = [{"namespace": self.namespace, **row._asdict()} for row in created]
                self._insert.run_many(connection, rows)
        return outcomes

    def _taken(self, connection: Connection, count: int) -> int:
        """Take numbers, or give the last ones back; the last number that is taken now."""
        taken = {"own": self.namespace, "count": count}
        found = self._take.run(connection, taken)
        if not found:
            connection.execute(FIRST_HEAD, {"namespace": self.namespace})
            found = self._take.run(connection, taken)
        last: int = found[0][0]
        return last

    def _related(self, connection: Connection, proposals: Sequence[Proposal]) -> list[EventRow]:
        """What the log has with the keys and about the subjects of the proposals."""
        keys = [proposal.key for proposal in proposals if proposal.key is not None]
        subjects = [one.event.subject for one in proposals if one.event.subject is not None]
        if not keys and not subjects:
            return []
        keys, subjects = _padded(keys), _padded(subjects)
        counts = (len(keys), len(subjects))
        if counts not in self._related_by_count:
            self._related_by_count[counts] = Statement(_related_query(*counts), self.engine.dialect)
        values = {f"key{i}": key for i, key in enumerate(keys)}
        values |= {f"subject{i}": subject for i, subject in enumerate(subjects)}
        found = self._related_by_count[counts].run(connection, {"namespace": self.namespace, **values})
        return list(set(map(EventRow._make, found)))


def _padded(names: list[str]) -> list[str]:
    """With the last name repeated up to a power of two, so that few statements serve all groups."""
    return names + names[-1:] * ((1 << (len(names) - 1).bit_length()) - len(names)) if names else names


def _wake(batch: Sequence[_Waiting]) -> None:
    """Wake each event loop once: a wake-up costs a system call."""
    loops: dict[asyncio.AbstractEventLoop, list[_Waiting]] = {}
    for one in batch:
        if one.task is not None:
            loops.setdefault(one.task.get_loop(), []).append(one)
    for loop, waiting in loops.items():
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
            loop.call_soon_threadsafe(_settle, waiting)


def _settle(batch: Sequence[_Waiting]) -> None:
    for one in batch:
        assert one.task is not None
        if one.task.done():
            continue
        if (error := one.future.exception()) is not None:
            one.task.set_exception(error)
        else:
            one.task.set_result(one.future.result())
