"""One replica's view of the log: the fold of all events committed so far. All replicas are equal.

A new encoder epoch changes the context of every decision, so the whole log is folded again: at once where it is
short, else beside the state that answers, in a thread of its own, which takes little of the interpreter at a time.
Until it has caught up, the former epoch answers and learns, and then the two are swapped. What is decided meanwhile is
of the former epoch, as what a replica decides that has not seen the new one yet: its contexts are made again from the
raw features.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from simmerge_ray.base.errors import StoreError
from simmerge_ray.service.log.event_log import EventLog
from simmerge_ray.service.log.events import Activation, EncoderEpoch, EventRow, RewardVoided
from simmerge_ray.service.log.fold import Encoder, State, View, basis_of
from simmerge_ray.service.log.snapshots import newest_snapshot, save_snapshot, snapshot_row

PAGE = 512  # events that are read at once: about 1 MB, so that they are still in the cache when they are folded
# Beside: few events at a time, then a rest that is a multiple of what they took. So nobody waits longer for the
# interpreter than these take, and two thirds of it are left, on a machine that is busy as well.
_FEW, _REST = 16, 2.0
AT_ONCE = 1000  # events that nobody notices: a tenth of a second
_RETRY_S = 5.0
_log = logging.getLogger("simmerge.service")


class Replica:
    """The state of a log, kept up to date. Threads may share it.

    encode: the selectors' encoders, by epoch. page: events that are read at once. at_once: how long a log may be that
    is folded again for a new epoch while everybody waits.
    """

    def __init__(self, log: EventLog, encode: Encoder, page: int = PAGE, at_once: int = AT_ONCE) -> None:
        self._log, self._encode, self._page, self._at_once = log, encode, page, at_once
        self._lock = threading.Lock()
        self._state: State | None = None
        self._view: View | None = None
        self._beside: threading.Thread | None = None  # folds a new epoch
        self._behind: int | None = None  # number of the first event that begins an epoch that does not answer yet
        self._failed: Exception | None = None  # why the last attempt ended
        self._try_at = 0.0  # monotonic
        self._closed = threading.Event()

    def catch_up(self) -> View:
        """Fold what is new, and the state as of then; of the former epoch while a new one is folded beside a long log.
        Raises StoreError: the database, or a log that is damaged or of another version. The next call tries again.
        """
        with self._lock:
            if self._state is None:
                self._state, self._behind = self._recovered(), None
            while rows := self._log.tail(self._state.seq, self._page):
                self._fold(self._state, rows)
                if len(rows) < self._page:
                    break
            if self._behind is not None and self._beside is None and self._state.seq <= self._at_once:
                self._state, self._behind, self._view = self._recovered(), None, None
            elif self._behind is not None and time.monotonic() >= self._try_at:
                self._begin_beside()
            if self._view is None or self._view.seq != self._state.seq:
                self._view = self._state.view()
            return self._view

    def settle(self) -> None:
        """Wait until the last epoch that was seen answers. Raises what keeps it from that, a StoreError mostly."""
        with self._lock:
            if self._behind is not None:
                self._begin_beside()
            thread = self._beside
        if thread is not None:
            thread.join()
        with self._lock:
            if self._behind is not None and self._failed is not None:
                raise self._failed

    def close(self) -> None:
        """End what is folded beside."""
        self._closed.set()
        if (thread := self._beside) is not None:
            thread.join()

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
            if self._passed_over(row, state):
                continue
            if not state.apply(row):
                state = self._recovered(state.basis.epoch_seq)
                break
        self._state = state

    def _passed_over(self, row: EventRow, state: State) -> bool:
        """Whether an event is for the state that is folded beside: the epoch, and which of its selectors answers."""
        begins = row.kind == EncoderEpoch.kind and row.seq > state.basis.epoch_seq
        if begins and self._behind is None:
            self._behind, self._try_at = row.seq, 0.0
        later = self._behind is not None and row.seq >= self._behind
        if begins or (later and row.kind == Activation.kind):
            state.pass_over(row)
            return True
        return False

    def _begin_beside(self) -> None:
        """Under the lock."""
        if self._beside is None:
            self._beside = threading.Thread(target=self._fold_beside, name="simmerge-epoch", daemon=True)
            self._beside.start()

    def _fold_beside(self) -> None:
        """In its own thread: the state of the last epoch, and the swap. Where it fails, the former epoch goes on."""
        try:
            state = self._recovered(rest=True)
            started = time.monotonic()
            while not self._swapped(state):
                started = self._rested(started)
            self.save_snapshot()
        except Exception as error:
            if not self._closed.is_set():
                _log.warning("a new encoder epoch is not in force yet; it is tried again: %s", error)
            with self._lock:
                self._beside, self._failed, self._try_at = None, error, time.monotonic() + _RETRY_S

    def _swapped(self, state: State) -> bool:
        """Fold some of what is new; whether `state` answers from now on, since it knows all that the other one knows.
        Where the past was changed again, it is folded again."""
        rows = self._log.tail(state.seq, _FEW)
        is_near = len(rows) < _FEW
        with self._lock if is_near else nullcontext():
            if all(state.apply(row) for row in rows):
                if not is_near or (self._state is not None and self._state.seq > state.seq):
                    return False
                self._state, self._view = state, None
                self._beside, self._failed, self._behind = None, None, None
                return True
        vars(state).update(vars(self._recovered(rest=True)))
        return False

    def _rested(self, started: float) -> float:
        """Rest for what was done since `started`; the time then."""
        if self._closed.wait(_REST * (time.monotonic() - started)):
            raise StoreError("the replica is closed")
        return time.monotonic()

    def _recovered(self, last_epoch: int | None = None, rest: bool = False) -> State:
        """The state at the present head: a snapshot, and what follows it.

        last_epoch: number of the event of the epoch that still answers; None takes the last one. rest: now and then.
        """
        last = self._log.head()
        past = self._log.changes_of_the_past(last)
        if last_epoch is not None:
            past = [row for row in past if row.kind != EncoderEpoch.kind or row.seq <= last_epoch]
        basis, voids = basis_of(past), [row for row in past if row.kind == RewardVoided.kind]
        state = newest_snapshot(self._log.engine, self._log.namespace, basis, voids, last, self._encode)
        started = time.monotonic()
        with nullcontext() if rest else _without_collection():
            while state.seq < last:
                for row in self._log.tail(state.seq, _FEW if rest else self._page, last):
                    if last_epoch is not None and self._passed_over(row, state):
                        continue
                    applied = state.apply(row)
                    assert applied, "the basis knows all events up to the head"
                if rest:
                    started = self._rested(started)
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
