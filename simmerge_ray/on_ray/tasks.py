"""A function run over many arguments, or one in the background, as Ray tasks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

_POLL_SECONDS = 0.5
_MAX_RETRIES = 3  # of a task whose worker or node was lost

Arguments = tuple[Any, ...]
OnWait = Callable[[], None] | None


def run_tasks(
    function: Callable[..., Any],
    calls: deque[Arguments],
    *,
    shared: Arguments = (),
    max_running: int | None = None,
    on_wait: OnWait = None,
    on_error: Callable[[Arguments, Exception], None] | None = None,
    **options: Any,
) -> Generator[tuple[Arguments, Any], None, None]:
    """Yield (arguments, result) of each call in the order in which the calls end.

    Calls are taken from the left of `calls`; the caller may add some between two results. An exception of a call is
    raised as its own type and cancels the calls that still run, as does a caller that stops early.

    Args:
        shared: first arguments of every call, put into the object store once.
        max_running: no more calls at a time; None leaves it to Ray.
        on_wait: called now and then while nothing ends.
        on_error: takes the exception of a call instead; the others go on.
        options: of the Ray tasks; one CPU each if they do not say.
    """
    import ray

    remote = ray.remote(function).options(**{"num_cpus": 1, "max_retries": _MAX_RETRIES} | options)
    references = [ray.put(value) for value in shared]
    running: dict[Any, Arguments] = {}
    try:
        while running or calls:
            while calls and (max_running is None or len(running) < max_running):
                arguments = calls.popleft()
                running[remote.remote(*references, *arguments)] = arguments
            ended, _ = ray.wait(list(running), timeout=_POLL_SECONDS if on_wait else None)
            if not ended and on_wait:
                on_wait()
            for task in ended:
                arguments = running.pop(task)
                try:
                    result = get_result(task)
                except Exception as error:
                    if on_error is None:
                        raise
                    on_error(arguments, error)
                else:
                    yield arguments, result
    finally:
        for task in running:
            ray.cancel(task, force=True)


@contextmanager
def in_background(function: Callable[..., Any], *arguments: Any) -> Iterator[Callable[[], Any]]:
    """Run one call on a CPU of the cluster while the block runs; what is yielded waits for its result."""
    import ray

    task = ray.remote(function).options(num_cpus=1).remote(*arguments)
    try:
        yield lambda: get_result(task)
    finally:
        if not ray.wait([task], timeout=0)[0]:  # Ray 2.60 may abort the driver where the task has just ended
            ray.cancel(task, force=True)


def get_result(task: Any) -> Any:
    """Wait for a task or call of an actor; an exception of its own is raised as its type, without Ray's wrapping."""
    import ray

    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
