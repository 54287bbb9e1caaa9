"""Nodes that read, and workers that take units from the queue of the signals: time passes by arithmetic only."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from simmerge_ray.signals.queue import Unit, WorkQueue

Times = dict[str, float]
"""Seconds, by what they are for."""


class Node:
    """A node's link to the store and its disk, which its workers use one after the other, and the cache on the disk,
    where the least recently used goes first.

    link, disk: bytes a second. cache_bytes: of the cache. one: bytes a second that one reader takes at most. pieces: of
    a checkpoint, that the cache keeps or throws away as a whole; finer than what is read at a time.
    """

    def __init__(self, link: float, disk: float, cache_bytes: float, one: float = math.inf, pieces: int = 4096) -> None:
        self._rates, self._one, self.cache_bytes, self._pieces = {"link": link, "disk": disk}, one, cache_bytes, pieces
        self._free_at = {"link": 0.0, "disk": 0.0}
        self._kept: OrderedDict[tuple[str, int], float] = OrderedDict()
        self.network_bytes = 0.0

    def begin(self) -> None:
        """Time begins at 0 again, and link and disk are free; the cache stays."""
        self._free_at = {"link": 0.0, "disk": 0.0}

    def read(
        self, checkpoint: str, size: float, at: float, first: float = 0.0, last: float = 1.0, readers: int = 1
    ) -> tuple[float, float]:
        """Seconds from `at` on that reading a share [first, last) of a checkpoint of `size` bytes takes: until what is
        missing has come over the link, and from the disk after that. readers: threads that read at the same time."""
        missing = self._fetch(checkpoint, size, first, last)
        there, together = max(0.0, (last - first) * size - missing), self._one * readers
        on_link = max(self._use("link", missing, at), missing / together)
        return on_link, max(self._use("disk", there, at + on_link), there / together)

    def read_all(
        self,
        checkpoints: Iterable[str],
        size: float,
        at: float,
        first: float = 0.0,
        last: float = 1.0,
        readers: int = 1,
    ) -> Times:
        """`read` of several checkpoints, one after the other; seconds by what for."""
        link = disk = 0.0
        for checkpoint in checkpoints:
            on_link, on_disk = self.read(checkpoint, size, at + link + disk, first, last, readers)
            link, disk = link + on_link, disk + on_disk
        return {"reading from the store": link, "reading from disks": disk}

    def read_alone(self, checkpoint: str, size: float, first: float, last: float, sharers: int) -> float:
        """Seconds over the link, which so many share all the time, of a read that is not planned among the others'."""
        return self._fetch(checkpoint, size, first, last) * sharers / self._rates["link"]

    def _fetch(self, checkpoint: str, size: float, first: float, last: float) -> float:
        """Bytes that the cache does not have; it has them afterwards, as far as there is room."""
        piece, missing = size / self._pieces, 0.0
        begin = int(first * self._pieces)
        for number in range(begin, max(begin + 1, math.ceil(last * self._pieces - 1e-9))):
            key = (checkpoint, number)
            if key in self._kept:
                self._kept.move_to_end(key)
                continue
            missing += piece
            if piece <= self.cache_bytes:
                self._kept[key] = piece
                while piece * len(self._kept) > self.cache_bytes:  # pieces are equal
                    self._kept.popitem(last=False)
        self.network_bytes += missing
        return missing

    def _use(self, what: str, num_bytes: float, at: float) -> float:
        """Seconds from `at` on until so many bytes have come, after those of others."""
        if not num_bytes:
            return 0.0
        self._free_at[what] = max(at, self._free_at[what]) + num_bytes / self._rates[what]
        return self._free_at[what] - at


@dataclass
class Worker:
    """held: the group whose weights are in memory. seconds: of its work, by what for."""

    number: int
    node: Node
    held: object = None
    seconds: dict[str, float] = field(default_factory=dict)

    def spend(self, **seconds: float) -> float:
        """Count seconds by what they were for; their sum."""
        for cause, amount in seconds.items():
            self.seconds[cause] = self.seconds.get(cause, 0.0) + amount
        return sum(seconds.values())


def make_workers(count: int, nodes: Sequence[Node]) -> list[Worker]:
    """As SPREAD places them: one node after the other."""
    return [Worker(number, nodes[number % len(nodes)]) for number in range(count)]


@dataclass(frozen=True)
class Phase:
    """A part of the study. causes: seconds of all workers together, by what they were for, the longest first."""

    name: str
    place: str
    workers: int
    units: int
    seconds: float
    network_bytes: float
    causes: Mapping[str, float]

    @staticmethod
    def of(name: str, place: str, workers: Sequence[Worker], units: int, seconds: float, network_bytes: float) -> Phase:
        """What workers have spent since the last one."""
        total: dict[str, float] = {}
        for worker in workers:
            for cause, amount in worker.seconds.items():
                total[cause] = total.get(cause, 0.0) + amount
            worker.seconds = {}
        causes = dict(sorted(total.items(), key=lambda entry: -entry[1]))
        return Phase(name, place, len(workers), units, seconds, network_bytes, causes)

    @property
    def cause(self) -> str:
        """What most of its time is for."""
        return next(iter(self.causes))

    @property
    def share(self) -> float:
        """Of its workers' seconds that are for this."""
        return self.causes[self.cause] / sum(self.causes.values())


def drain(
    queue: WorkQueue,
    workers: Sequence[Worker],
    work: Callable[[Worker, Unit, float], float],
    finished: Callable[[int, Unit], None] = lambda index, unit: None,
    start: float = 0.0,
) -> float:
    """Let workers empty a queue as the actors do, who is free takes the unit that the queue gives it; when the last one
    has ended. work: seconds of a unit that a worker begins at a time. finished: may add units."""
    idle, running, now = list(workers), list[tuple[float, int, int]](), start
    while True:
        waiting: list[Worker] = []
        for worker in idle:
            taken = queue.take(worker.number)
            if taken is None:
                waiting.append(worker)
            else:
                heapq.heappush(running, (now + work(worker, taken[1], now), worker.number, taken[0]))
        idle = waiting
        if not running:
            return now
        now, number, index = heapq.heappop(running)
        finished(index, queue.units[index])
        idle.append(workers[number])
