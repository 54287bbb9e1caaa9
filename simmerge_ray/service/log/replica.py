"""One replica's view of the log: the fold of all events committed so far. All replicas are equal."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from simmerge_ray.service.log.event_log import EventLog
from simmerge_ray.service.log.events import EventRow, RewardVoided
from simmerge_ray.service.log.fold import Encoder, State, View, basis_of
from simmerge_ray.service.log.snapshots import newest_snapshot, save_snapshot, snapshot_row

PAGE = 512  # events that are read at once: about 1 MB, so that they are still in the cache when they are folded


class Replica:
    """The state of a log, kept up to date. Threads may share it.

    encode: the selectors' encoders, by epoch. page: events that are read at once.
    """

    def __init__(self, log: EventLog, encode: Encoder, page: int = PAGE) -> None:
        self._log, self._encode, self._page = log, encode, page
        self._lock = threading.Lock()
        self._state: State | None = None
        self._view: View | None = None

    def catch_up(self) -> View:
        """Fold what is new, and the state as of then.
        Raises StoreError: the database, or a log that is damaged or of another version. The next call tries again.
        """
        with self._lock:
            if self._state is None:
                self._state = self._recovered()
            while rows := self._log.tail(self._state.seq, self._page):
                self._fold(self._state, rows)
                if len(rows) < self._page:
                    break
            if self._view is None or self._view.seq != self._state.seq:
                self._view = self._state.view()
            return self._view

    def expired(self, now: float) -> list[str]:
        """Open decisions as of the last `catch_up` whose time is over; somebody has to log that they are closed."""
        with self._lock:
            return [] if self._state is None else self._state.expired(now)

    def save_snapshot(self) -> None:
        """Store the state as of the last `catch_up`. Raises StoreError."""
        with self._lock:
            if self._state is None or self._state.seq == 0:
                return
            row = snapshot_row(self._log.namespace, self._state)
        save_snapshot(self._log.engine, row)  # outside the lock: nobody waits for the disk

    def _fold(self, state: State, rows: list[EventRow]) -> None:
        self._state = None  # a state that failed within an event is not continued
        for row in rows:
            if not state.apply(row):
                state = self._recovered()
                break
        self._state = state

    def _recovered(self) -> State:
        """The state at the present head: a snapshot, and what follows it."""
        last = self._log.head()
        past = self._log.changes_of_the_past(last)
        basis, voids = basis_of(past), [row for row in past if row.kind == RewardVoided.kind]
        state = newest_snapshot(self._log.engine, self._log.namespace, basis, voids, last, self._encode)
        with _without_collection():
            while state.seq < last:
                for row in self._log.tail(state.seq, self._page, last):
                    applied = state.apply(row)
                    assert applied, "the basis knows all events up to the head"
        return state


@contextmanager
def _without_collection() -> Iterator[None]:
    """A fold makes no cycles, and looking for some among all that it makes is a twelfth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
