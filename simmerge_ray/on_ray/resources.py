"""A Ray cluster for the time of a block, and work spread over actors."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.storage import digest_json
from simmerge_ray.capacity.placement import Needs, missing_on

_log = logging.getLogger(__name__)
_own_cluster = False  # started by this process, so it does not grow
_POLL_SECONDS = 0.5
_STORE_VARIABLES = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "FSSPEC_S3_ENDPOINT_URL",
    "STORAGE_EMULATOR_HOST", "SIMMERGE_STORE_PATIENCE",
)  # fmt: skip
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

    global _own_cluster
    if ray.is_initialized():
        yield
        return
    _own_cluster = "RAY_ADDRESS" not in os.environ
    if not _own_cluster:
        ray.init(log_to_driver=False, logging_level="warning", runtime_env={"env_vars": store_variables()})
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
        _own_cluster = False


def is_submitted() -> bool:
    """Whether this process is the driver of a job that `ray job submit` has started."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # set by Ray for such a driver and for nobody else


def on_running_cluster() -> bool:
    """Whether work of this process goes to a cluster that is there already, as in a submitted job."""
    if "RAY_ADDRESS" in os.environ:
        return True
    if "ray" not in sys.modules:  # importing it takes seconds
        return False
    import ray

    return bool(ray.is_initialized()) and not _own_cluster


def offered_resources() -> Collection[str]:
    """Names of the resources that the nodes of the current cluster offer now."""
    import ray

    return frozenset(ray.cluster_resources())


def check_room(needs: Needs, what: str) -> None:
    """Say, before waiting for it, that no node has room for one actor.

    Raises:
        ConfigError: and none will, since this process has started the cluster. Another cluster may grow: a warning.
    """
    import ray

    missing = missing_on(needs, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if missing is None:
        return
    if _own_cluster:
        raise ConfigError(f"no room for {what}: {missing}")
    _log.warning("no node has room for %s: %s; waiting for one that has", what, missing)


class _Holder:
    """An actor that is there as long as its job is."""

    def ready(self) -> None:
        """Answers."""


@contextmanager
def only_job(what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other job of the cluster is at the same output, and keep others waiting, for the time of a block.

    Ray frees the place when the job that holds it ends, however it does. A cluster that this process has started has no
    other jobs.

    Args:
        what: URI or path of the output. say: told once, when there is something to wait for.
    """
    import ray

    with ray_session():
        if _own_cluster:
            yield
            return
        options = {"name": f"job {digest_json(what)}", "namespace": "simmerge_ray", "num_cpus": 0, "max_restarts": 0}
        told = False
        while True:
            try:
                holder = ray.remote(_Holder).options(**options).remote()
                ray.get(holder.ready.remote())
                break
            except ValueError:  # the name is taken
                if not told:
                    say(f"another job is at work on {what}; waiting until it ends")
                told = True
                time.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            ray.kill(holder)


def store_variables() -> dict[str, str]:
    """Where stores are, of this process' environment, for workers of a cluster that runs already.

    No credentials: whoever sees the dashboard sees a job's environment, and nodes have roles or secrets of their own.
    Nothing under `ray job submit`: its workers have the environment of the job.
    """
    if is_submitted():
        return {}
    return {name: os.environ[name] for name in _STORE_VARIABLES if name in os.environ}


class ActorPool:
    """Actors of one kind that share work, for the time of a `with` block.

    An actor gets work once it has started, two calls at a time, so that it never waits for the driver; actors for which
    the cluster has no room yet hold nothing up. The calls of an actor that died are made again by another, and a new
    one takes its place. When nothing else waits, a call that has run for long is also given to an idle actor: who
    answers first counts, so a slow node holds nobody up. Calls must therefore be functions of their payload.
    """

    def __init__(self, spawn: Callable[[], Any], max_losses: int = 3, patience_s: float = 60.0) -> None:
        """
        Args:
            spawn: starts one actor.
            max_losses: how often the actor of one call may die; a node that was taken back by its owner is not counted.
            patience_s: a call is not given a second time before, nor before three times the seconds of a usual call.
        """
        self._spawn, self._max_losses, self._patience_s = spawn, max_losses, patience_s
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
        calls = _Calls(self._actors, method, self._patience_s)
        losses: dict[int, int] = {}
        while True:
            idle = []
            for number in free:
                taken = calls.lost.pop() if calls.lost else take(number)
                if taken is None:
                    idle.append(number)
                else:
                    calls.make(number, *taken)
            if not calls.open and not calls.lost and (idle or not starting):
                return
            free = calls.give_again(idle)
            timeout = self._patience_s / 2 if idle and calls.open else None
            found = ray.wait([*calls.in_flight, *starting], num_returns=1, timeout=timeout)[0]
            if not found:
                continue
            done = found[0]
            call = calls.in_flight.pop(done, None)
            number = starting.pop(done) if call is None else call.actor
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, Exception) else error) from None
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                index = -1 if call is None else call.index
                losses[index] = losses.get(index, 0) + (not getattr(error, "preempted", False))
                if losses[index] > self._max_losses:
                    raise
                if call is not None:
                    calls.lose(call)
                if isinstance(error, ray.exceptions.ObjectLostError):  # the result was lost, the actor may be alive
                    free.append(number)
                    continue
                free = [other for other in free if other != number]
                if number in self._actors:  # not yet replaced, for another of its calls
                    del self._actors[number]
                    self._ready.discard(number)
                    replacement = self._start()
                    starting[self._actors[replacement].__ray_ready__.remote()] = replacement
                continue
            if call is None:
                self._ready.add(number)
                free += (number, number)
                continue
            free.append(number)
            if calls.end(call):
                yield call.index, result

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
    """Calls of one `ActorPool.drain`. open: how many actors each unfinished one was given to, by its index."""

    def __init__(self, actors: dict[int, Any], method: str, patience_s: float) -> None:
        self._actors, self._method, self._patience_s = actors, method, patience_s
        self.in_flight: dict[Any, _Call] = {}
        self.open: dict[int, int] = {}
        self.lost: list[tuple[int, Any]] = []
        self._seconds, self._num_ended = 0.0, 0

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
        """Make it again, unless it was answered, or another actor is at it."""
        if call.index in self.open:
            self.open[call.index] -= 1
            if not self.open[call.index]:
                del self.open[call.index]
                self.lost.append((call.index, call.payload))

    def give_again(self, idle: list[int]) -> list[int]:
        """Give calls that take long to actors that have nothing to do; returns the places that are still free."""
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
