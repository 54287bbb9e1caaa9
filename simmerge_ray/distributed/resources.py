"""A Ray cluster for the time of a block, and work spread over actors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
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


def drain_over_actors(
    actors: Sequence[Any], method: str, take: Callable[[int], tuple[int, Any] | None]
) -> Iterator[tuple[int, Any]]:
    """Call `method` of each actor with what `take` gives for it; yields (index, result) as they end.

    Two calls are in flight per actor, so that it never waits for the driver. The caller may make more work between two
    results. An exception of a call is raised here as its own type, not as Ray's.

    Args:
        take: of the actor's number; `(index, payload)`, or None when nothing waits now.
    """
    import ray

    in_flight: dict[Any, tuple[int, int]] = {}
    free = [*range(len(actors)), *range(len(actors))]
    while True:
        idle = []
        for number in free:
            taken = take(number)
            if taken is None:
                idle.append(number)
                continue
            index, payload = taken
            in_flight[getattr(actors[number], method).remote(payload)] = (index, number)
        if not in_flight:
            return
        done, _ = ray.wait(list(in_flight), num_returns=1)
        index, number = in_flight.pop(done[0])
        free = [*idle, number]
        try:
            result = ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        yield index, result
