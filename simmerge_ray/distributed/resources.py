"""A Ray cluster for the time of a block, and work spread over actors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_OBJECT_STORE_BYTES = 400_000_000  # results are small numbers; the default takes a third of the memory


@contextmanager
def ray_session(num_cpus: int | None = None) -> Iterator[None]:
    """Connect to Ray, and leave it as it was found.

    With `RAY_ADDRESS` set (as in `ray job submit`) or Ray already initialised, that cluster is used. Otherwise a
    cluster of this process is started and stopped at the end, also after an error or Ctrl-C. Ray's processes end with
    this one even if it is killed (two idle agents need a minute for it: they first try to tell the dead head).
    """
    # Read when Ray is imported. Without the first, `uv run` would start every worker through uv; without the
    # second, Tune catches Ctrl-C and goes on until the running trials have ended.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False, logging_level="warning")
    else:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
            object_store_memory=_OBJECT_STORE_BYTES,
        )
    try:
        yield
    finally:
        ray.shutdown()


class ActorPool:
    """Actors of one kind that share work, for the time of a `with` block.

    An actor gets work once it has started, two calls at a time, so that it never waits for the driver; actors for which
    the cluster has no room yet hold nothing up. The calls of an actor that died are made again by another, and a new
    one takes its place.
    """

    def __init__(self, spawn: Callable[[], Any], max_losses: int = 3) -> None:
        """
        Args:
            spawn: starts one actor. max_losses: how often the actor of one call may die.
        """
        self._spawn, self._max_losses = spawn, max_losses
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

        The caller may make more work between two results. An exception of a call is raised here as its own type, not as
        Ray's.

        Args:
            take: of the actor's number; `(index, payload)`, or None when nothing waits now.
            num_actors: grow to so many.

        Raises:
            ray.exceptions.RayActorError: the actors of one call died again and again.
        """
        import ray

        while len(self._actors) < num_actors:
            self._start()
        starting = {self._actors[n].__ray_ready__.remote(): n for n in self._actors if n not in self._ready}
        free = [number for number in self._ready for _ in range(2)]
        in_flight: dict[Any, tuple[int, int, Any]] = {}
        lost: list[tuple[int, Any]] = []
        losses: dict[int, int] = {}
        while True:
            idle = []
            for number in free:
                taken = lost.pop() if lost else take(number)
                if taken is None:
                    idle.append(number)
                    continue
                in_flight[getattr(self._actors[number], method).remote(taken[1])] = (taken[0], number, taken[1])
            if not in_flight and not lost and (idle or not starting):
                return
            done = ray.wait([*in_flight, *starting], num_returns=1)[0][0]
            is_start = done in starting
            index, number, payload = (-1, starting.pop(done), None) if is_start else in_flight.pop(done)
            free = [*idle, *((number, number) if is_start else (number,))]
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, Exception) else error) from None
            except ray.exceptions.RayActorError:
                losses[index] = losses.get(index, 0) + 1
                if losses[index] > self._max_losses:
                    raise
                if not is_start:
                    lost.append((index, payload))
                free = [other for other in free if other != number]
                if number in self._actors:  # not yet replaced, for another of its calls
                    del self._actors[number]
                    self._ready.discard(number)
                    replacement = self._start()
                    starting[self._actors[replacement].__ray_ready__.remote()] = replacement
                continue
            if is_start:
                self._ready.add(number)
            else:
                yield index, result

    def _start(self) -> int:
        self._actors[self._count] = self._spawn()
        self._count += 1
        return self._count - 1
