"""A function run over many arguments, or one in the background, as Ray tasks."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from simmerge_ray.base.errors import WorkerError

_POLL_SECONDS = 0.5
_MAX_RETRIES = 3  # of a task whose worker or node was lost
_MEMORY = re.compile(r"was ([\d.]+) ?GB(?: used)? / ([\d.]+) ?GB")  # in Ray's words

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

    Raises:
        WorkerError: the workers of one call died, or were killed for memory, again and again.

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
                    if on_error is not None:
                        on_error(arguments, error)
                    elif is_loss(error):
                        raise lost_for_good(error, _MAX_RETRIES + 1, options.get("memory", 0.0)) from None
                    else:
                        raise
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


def is_loss(error: BaseException) -> bool:
    """Whether a worker is gone, so that another may do its work: it died, or Ray killed it since memory was short."""
    import ray

    lost = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError)
    return isinstance(error, lost)


def is_short_of_memory(error: BaseException) -> bool:
    """Whether Ray killed a worker since its node was short of memory; for an actor it may say so only in words."""
    import ray

    return isinstance(error, ray.exceptions.OutOfMemoryError) or "running low on memory" in str(error)


def loss_text(error: BaseException, worker_bytes: float = 0.0) -> str:
    """One line on a worker that is gone. worker_bytes: what it is expected to hold, where that is known."""
    if not is_short_of_memory(error):
        return f"a worker died: {last_line(error)}"
    told = _MEMORY.search(str(error))
    there = f" ({told.group(1)} of {told.group(2)} GB were in use)" if told else ""
    needs = f"; a worker needs about {worker_bytes / 1e9:.1f} GB" if worker_bytes else ""
    return f"Ray killed a worker since its machine ran out of memory{there}{needs}"


def last_line(error: BaseException | None) -> str:
    """Of a trace on another node, which ends with the error itself."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def lost_for_good(error: BaseException, times: int, worker_bytes: float = 0.0) -> WorkerError:
    """What ends a program whose workers die again and again at one piece of work."""
    remedy = "what was finished is kept: run the same command again"
    if is_short_of_memory(error):
        remedy += ", with fewer workers at a time, or when other programs have ended"
    return WorkerError(f"{loss_text(error, worker_bytes)}; it was tried {times} times; {remedy}")


def get_result(task: Any) -> Any:
    """Wait for a task or call of an actor; an exception of its own is raised as its type, without Ray's wrapping."""
    import ray

    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
