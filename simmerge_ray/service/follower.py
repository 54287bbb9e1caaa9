"""One replica's side of the event log: it opens the database, starts an empty log, folds, and saves snapshots.

What blocks runs in two threads: the log's own, which looks at the log, makes events of what it sees and commits them;
and one that reads and folds for everybody else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from simmerge_ray.base.config import ServiceConfig
from simmerge_ray.base.errors import StoreError
from simmerge_ray.service.context import Contexts
from simmerge_ray.service.log.database import open_database
from simmerge_ray.service.log.event_log import EventLog
from simmerge_ray.service.log.events import Activation, EncoderEpoch, Event, WarmStart, damaged
from simmerge_ray.service.log.fold import View
from simmerge_ray.service.log.ledger import Ledger
from simmerge_ray.service.log.outcomes import Outcome
from simmerge_ray.service.log.replica import Replica
from simmerge_ray.service.registry import Published, Registry
from simmerge_ray.signals.table import SignalTable

_log = logging.getLogger("simmerge.service")


class Follower:
    """See the module. The event loop that asks it also stops it.

    given: version of the selector that an empty log begins with. clock: seconds since 1970.
    """

    def __init__(
        self,
        settings: ServiceConfig,
        registry: Registry,
        table: SignalTable,
        given: str | None,
        clock: Callable[[], float],
    ) -> None:
        self._settings, self._clock = settings, clock
        self._registry, self._table, self._given = registry, table, given
        self._contexts: dict[str, Contexts] = {}
        self._encoders: dict[int, Contexts] = {}  # of the epoch that answers, and of one that is folded beside
        self._log: EventLog | None = None
        self._replica: Replica | None = None
        self._ledger: Ledger | None = None
        self._snapshot_seq, self._has_begun = 0, False
        self._reader = ThreadPoolExecutor(1, "simmerge-fold")
        self._running: asyncio.Task[View] | None = None
        self._queued: asyncio.Task[View] | None = None

    async def stop(self) -> None:
        """Commit what was accepted, and end all threads."""
        if self._log is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._log.close)
        if self._replica is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._replica.close)
        self._reader.shutdown(wait=True)
        if self._log is not None:
            self._log.engine.dispose()

    async def ledger(self) -> Ledger:
        """What became of all decisions. Raises StoreError."""
        await self.opened()
        assert self._ledger is not None
        return self._ledger

    async def expired(self) -> list[str]:
        """Open decisions whose time is over. Raises StoreError."""
        await self.view()
        assert self._replica is not None
        return self._replica.expired(self._clock())

    async def view(self) -> View:
        """The state as of a read of the log that began after this call."""
        if self._queued is None:
            self._queued = asyncio.create_task(self._read(self._running))
        return await asyncio.shield(self._queued)

    async def settled(self) -> View:
        """The state in the last encoder epoch of the log, for which it waits. Raises StoreError: what keeps it back."""
        await self.view()
        assert self._replica is not None
        await asyncio.get_running_loop().run_in_executor(None, self._replica.settle)
        return await self.view()

    async def _read(self, before: asyncio.Task[View] | None) -> View:
        if before is not None:
            await asyncio.wait([before])
        self._running, self._queued = self._queued, None  # who comes from here on waits for the next read
        return await asyncio.get_running_loop().run_in_executor(self._reader, self._fold)

    async def opened(self) -> EventLog:
        """The log, begun."""
        if not self._has_begun:
            await self.view()
        assert self._log is not None
        return self._log

    async def append(self, event: Event, key: str | None, payload: Any = None) -> Outcome:
        """Raises StoreError."""
        return await (await self.opened()).append_async(event, key, payload)

    def published(self, view: View) -> Published:
        """The selector that is in force. Raises StoreError."""
        if view.model_version is None:
            raise StoreError("the log names no selector yet")
        return self._registry.load(view.model_version)

    def contexts_of(self, view: View) -> Contexts:
        """Pairs as that selector sees them. Several threads ask."""
        version = view.model_version or ""
        found = self._contexts.get(version)
        if found is None:
            published = self.published(view)
            published.selector.check_table(self._table)
            found = Contexts(published, self._table)
            self._contexts = {version: found}
        for arm, one in view.posteriors.items():
            if one.num_dimensions != found.num_dimensions:
                sizes = f"{one.num_dimensions} dimensions, and its selector {version} makes contexts of"
                raise damaged(f"the arm {arm!r} has {sizes} {found.num_dimensions}")
        return found

    def _fold(self) -> View:
        """In the thread of `_reader`: open the database if need be, begin an empty log, fold what is new."""
        replica = self._connected()
        view = replica.catch_up()
        if not _is_begun(view):
            view = self._begun(replica, view)
        self._has_begun = True
        self._snapshot_if_due(view)
        return view

    def _look(self) -> View:
        """In the log's thread, for a group of decisions: fold what is new."""
        assert self._replica is not None
        view = self._replica.catch_up()
        if not _is_begun(view):
            self._has_begun = False  # the next request starts it; this thread would wait for itself
            raise StoreError("the event log was emptied; it begins anew")
        self._snapshot_if_due(view)
        return view

    def _snapshot_if_due(self, view: View) -> None:
        if view.seq - self._snapshot_seq >= self._settings.snapshot_every:
            self._snapshot_seq = view.seq
            self._reader.submit(self._save_snapshot)

    def _connected(self) -> Replica:
        if self._replica is None:
            engine = open_database(self._settings.database)
            self._log = EventLog(engine, self._settings.namespace, self._clock, self._look)
            self._ledger = Ledger(self._log)
            self._replica = Replica(self._log, self._encode)
        return self._replica

    def _begun(self, replica: Replica, view: View) -> View:
        """The first two events of a log: which selector, then what its arms start from.

        Several replicas may try at once, and any of them may end between the two. One key for each, so one selector
        wins; and the second event is that of the selector that the first one names, so that anybody can append it.
        """
        assert self._log is not None
        if view.model_version is None:
            if self._given is None:
                raise StoreError("the event log is empty and no selector was given to begin with")
            self._log.append(Activation(self._given), "start/activation", {"version": self._given})
            view = replica.catch_up()
            if view.model_version != self._given:
                _log.warning("the log was begun with the selector %s; %s is not used", view.model_version, self._given)
        if not view.posteriors:
            published = self.published(view)
            warm = WarmStart(*Contexts(published, self._table).priors())
            self._log.append(warm, "start/warm", {"version": published.version})
            view = replica.catch_up()
        return view

    def _encode(self, epoch: int, features: np.ndarray, keep: bool) -> tuple[np.ndarray, float]:
        """For the fold: z and level of raw features by the selector of an epoch; keep: see `Contexts.encode`."""
        assert self._log is not None
        if epoch not in self._encoders:
            begun = [row for row in self._log.history(str(epoch)) if row.kind == EncoderEpoch.kind]
            if not begun:
                raise damaged(f"it has no encoder epoch {epoch}")
            version = begun[0].decoded(EncoderEpoch).model_version
            latest = dict(list(self._encoders.items())[-1:])
            self._encoders = latest | {epoch: Contexts(self._registry.load(version), self._table)}
        return self._encoders[epoch].encode(features, keep)

    def _save_snapshot(self) -> None:
        try:
            if self._replica is not None:
                self._replica.save_snapshot()
        except StoreError as error:
            _log.warning("no snapshot: %s", error)


def _is_begun(view: View) -> bool:
    return bool(view.posteriors) and view.model_version is not None
