"""Nodes that read, and workers that take units from the queue of the signals: time passes by arithmetic only."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from simmerge_ray.signals.queue import Unit, WorkQueue

PIECES = 64  # of a checkpoint: what a cache keeps or throws away as a whole


class Node:
    """A node's link to the store and its disk, which its workers use one after the other, and the cache on the disk,
    where the least recently used goes first.

    Args:
        link, disk: bytes a second. cache_bytes: of the cache. one: bytes a second from the disk for one worker at most.
    """

    def __init__(self, link: float, disk: float, cache_bytes: float, one: float = math.inf) -> None:
        self._rates, self._one, self.cache_bytes = {"link": link, "disk": disk}, one, cache_bytes
        self._free_at = {"link": 0.0, "disk": 0.0}
        self._kept: OrderedDict[tuple[str, int], float] = OrderedDict()
        self.network_bytes = 0.0

    def read(
        self, checkpoint: str, size: float, at: float, first: float = 0.0, last: float = 1.0
    ) -> tuple[float, float]:
        """Seconds from `at` on that reading a share [first, last) of a checkpoint of `size` bytes takes: of the link
        (waiting for it included), and of the disk."""
        piece = size / PIECES
        numbers = range(int(first * PIECES), max(int(first * PIECES) + 1, -int(-last * PIECES // 1)))
        missing = 0.0
        for number in numbers:
            key = (checkpoint, number)
            if key in self._kept:
                self._kept.move_to_end(key)
                continue
            missing += piece
            self._keep(key, piece)
        self.network_bytes += missing
        there = max(0.0, (last - first) * size - missing)
        on_link = self._use("link", missing, at)
        return on_link, max(self._use("disk", there, at + on_link), there / self._one)

    def _use(self, what: str, num_bytes: float, at: float) -> float:
        """Seconds from `at` on until so many bytes have come, after those of others."""
        if not num_bytes:
            return 0.0
        self._free_at[what] = max(at, self._free_at[what]) + num_bytes / self._rates[what]
        return self._free_at[what] - at

    def _keep(self, key: tuple[str, int], num_bytes: float) -> None:
        if num_bytes > self.cache_bytes:
            return
        self._kept[key] = num_bytes
        while num_bytes * len(self._kept) > self.cache_bytes:  # pieces are equal
            self._kept.popitem(last=False)


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


def drain(
    queue: WorkQueue,
    workers: Sequence[Worker],
    work: Callable[[Worker, Unit, float], float],
    finished: Callable[[int, Unit], None] = lambda index, unit: None,
    start: float = 0.0,
) -> float:
    """Let workers empty a queue as the actors do: who is free takes the unit that the queue gives it.

    Args:
        work: seconds of a unit that a worker begins at a time. finished: may add units.

    Returns:
        When the last one has ended.
    """
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
