"""Work spread over actors of one kind, which may die."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from simmerge_ray.on_ray.tasks import get_result, is_loss, is_short_of_memory, lost_for_good


class ActorPool:
    """Actors of one kind that share work, for the time of a `with` block.

    An actor gets work once it has started, two calls at a time, so that it never waits for the driver; actors for which
    the cluster has no room yet delay nothing. When an actor dies, another repeats its calls and a new actor takes its
    place; one that Ray killed since memory was short is replaced only where no other is left: fewer need less. When no
    other work waits, a long call is also given to an idle actor and the first answer counts, so that a slow node delays
    nothing. Calls must therefore be pure functions of their payload.
    """

    def __init__(
        self, spawn: Callable[[], Any], max_losses: int = 3, patience_s: float = 60.0, worker_bytes: float = 0.0
    ) -> None:
        """
        Args:
            spawn: starts one actor.
            max_losses: how often the actor of one call may die; preempted nodes do not count.
            patience_s: a call is repeated elsewhere only after this time and three times the mean of a call.
            worker_bytes: what an actor is expected to hold, for messages.
        """
        self._spawn, self._max_losses, self._patience_s = spawn, max_losses, patience_s
        self._worker_bytes = worker_bytes
        self._actors: dict[int, Any] = {}
        self._ready: set[int] = set()
        self._count = 0

    def __enter__(self) -> ActorPool:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()

    def drain(
        self, method: str, take: Callable[[int], tuple[int, Any] | None], num_actors: int
    ) -> Iterator[tuple[int, Any]]:
        """Call `method` with what `take` gives; yields (index, result) as they end.

        The caller may add work between two results. An exception of a call is raised as its own type, not as Ray's.

        Args:
            take: of the actor's number; `(index, payload)`, or None when nothing waits now.
            num_actors: the pool grows to this size.

        Raises:
            WorkerError: the actors of one call died, or were killed for memory, again and again.
        """
        import ray

        while len(self._actors) < num_actors:
            self._start()
        starting = self._starting(self._actors.keys() - self._ready)
        free = [number for number in self._ready for _ in range(2)]
        calls = _Calls(self._actors, method, self._patience_s)
        losses: Counter[int] = Counter()
        while True:
            idle = calls.hand_out(free, take)
            if not calls.open and not calls.lost and (idle or not starting):
                return
            free = calls.give_again(idle)
            timeout = self._patience_s / 2 if idle and calls.open else None
            ended = ray.wait([*calls.in_flight, *starting], num_returns=1, timeout=timeout)[0]
            if not ended:
                continue
            call = calls.in_flight.pop(ended[0], None)
            number = starting.pop(ended[0]) if call is None else call.actor
            try:
                result = get_result(ended[0])
            except ray.exceptions.RayError as error:
                if not (is_lost_object := isinstance(error, ray.exceptions.ObjectLostError)) and not is_loss(error):
                    raise
                index = -1 if call is None else call.index
                losses[index] += not getattr(error, "preempted", False)
                if losses[index] > self._max_losses:
                    raise lost_for_good(error, losses[index], self._worker_bytes) from None
                if call is not None:
                    calls.lose(call)
                if is_lost_object:  # the result was lost, the actor may be alive
                    free.append(number)
                    continue
                free = [other for other in free if other != number]
                if number in self._actors:  # not yet replaced, for another of its calls
                    del self._actors[number]
                    self._ready.discard(number)
                    if not (is_short_of_memory(error) and self._actors):
                        starting |= self._starting([self._start()])
                continue
            if call is None:
                self._ready.add(number)
                free += (number, number)
                continue
            free.append(number)
            if calls.end(call):
                yield call.index, result

    def _starting(self, numbers: Iterable[int]) -> dict[Any, int]:
        """Actors by what Ray answers when they have started."""
        return {self._actors[number].__ray_ready__.remote(): number for number in sorted(numbers)}

    def _start(self) -> int:
        self._actors[self._count] = self._spawn()
        self._count += 1
        return self._count - 1


@dataclass(frozen=True)
class _Call:
    index: int
    actor: int
    payload: Any
    since: float


class _Calls:
    """Calls of one `ActorPool.drain`. open: how many actors work at each unfinished call, by its index."""

    def __init__(self, actors: dict[int, Any], method: str, patience_s: float) -> None:
        self._actors, self._method, self._patience_s = actors, method, patience_s
        self.in_flight: dict[Any, _Call] = {}
        self.open: dict[int, int] = {}
        self.lost: list[tuple[int, Any]] = []
        self._seconds, self._num_ended = 0.0, 0

    def hand_out(self, free: list[int], take: Callable[[int], tuple[int, Any] | None]) -> list[int]:
        """Give every free place a call, lost ones first; returns the places that are left."""
        idle = []
        for number in free:
            if taken := self.lost.pop() if self.lost else take(number):
                self.make(number, *taken)
            else:
                idle.append(number)
        return idle

    def make(self, actor: int, index: int, payload: Any) -> None:
        reference = getattr(self._actors[actor], self._method).remote(payload)
        self.in_flight[reference] = _Call(index, actor, payload, time.monotonic())
        self.open[index] = self.open.get(index, 0) + 1

    def end(self, call: _Call) -> bool:
        """Whether it is the first answer to this call."""
        if call.index not in self.open:
            return False
        del self.open[call.index]
        self._seconds += time.monotonic() - call.since
        self._num_ended += 1
        return True

    def lose(self, call: _Call) -> None:
        """Repeat it, unless it was answered or another actor works at it."""
        if call.index in self.open:
            self.open[call.index] -= 1
            if not self.open[call.index]:
                del self.open[call.index]
                self.lost.append((call.index, call.payload))

    def give_again(self, idle: list[int]) -> list[int]:
        """Give long calls to idle actors as well; returns the places that are still free."""
        idle = list(idle)
        usual = self._seconds / self._num_ended if self._num_ended else 0.0
        limit = time.monotonic() - max(self._patience_s, 3 * usual)
        for call in list(self.in_flight.values()):  # the oldest first
            if call.since > limit or self.open.get(call.index) != 1:
                continue
            actor = next((one for one in idle if one != call.actor and idle.count(one) == 2), None)
            if actor is None:
                break
            idle = [one for one in idle if one != actor] + [actor]
            self.make(actor, call.index, call.payload)
        return idle
