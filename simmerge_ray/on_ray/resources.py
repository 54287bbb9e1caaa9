"""A Ray cluster for the time of a block, its resources, and jobs that wait for each other."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from simmerge_ray.base.errors import ClusterError, ConfigError, first_line
from simmerge_ray.base.memory import free_memory, total_memory
from simmerge_ray.base.storage import digest_json
from simmerge_ray.capacity.placement import Needs, missing_on

_log = logging.getLogger(__name__)
_own_cluster = False  # started by this process, so it does not grow
_POLL_SECONDS = 0.5
_PATIENCE = 10.0  # seconds for a head to take a connection
_STORE_VARIABLES = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "FSSPEC_S3_ENDPOINT_URL",
    "STORAGE_EMULATOR_HOST", "SIMMERGE_STORE_PATIENCE",
)  # fmt: skip
_MEMORY_SHARE, _FREE_SHARE = 0.7, 0.9
_OBJECT_STORE_BYTES = 400_000_000  # results are small numbers; the default takes a third of the memory


@contextmanager
def ray_session(num_cpus: int | None = None) -> Iterator[None]:
    """Connect to Ray, and leave it as it was found.

    With `RAY_ADDRESS` set (as in `ray job submit`) or Ray already initialised, that cluster is used. Otherwise a
    cluster of this process is started and stopped at the end, also after an error or Ctrl-C. Ray's processes end with
    this one even if it is killed (two idle agents need a minute for it: they first try to tell the dead head).

    Raises:
        ConfigError: nobody answers at `RAY_ADDRESS`. ClusterError: Ray does not start.
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
    options: dict[str, Any] = {"runtime_env": {"env_vars": store_variables()}}
    if _own_cluster:
        options = {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
        options |= {"object_store_memory": _OBJECT_STORE_BYTES, "_memory": memory_for_workers()}
    else:
        _check_address(os.environ["RAY_ADDRESS"])
    try:
        ray.init(log_to_driver=False, logging_level="warning", **options)
    except (Exception, SystemExit) as error:  # Ray's own are of no type, and it exits where a cluster is silent
        _log.exception("ray.init failed")
        ray.shutdown()
        where = "here; a machine that is busy may need longer than it waits: try again" if _own_cluster else "there"
        _own_cluster = False
        raise ClusterError(f"Ray did not start {where}. It says: {first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()
        _own_cluster = False


def _check_address(address: str) -> None:
    """Raises ConfigError: nobody listens at the HOST:PORT of an address. Ray itself waits minutes and says little."""
    if found := re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+)\]?:(\d+)", address):
        try:
            socket.create_connection((found[1], int(found[2])), _PATIENCE).close()
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"no Ray cluster answers at RAY_ADDRESS={address!r} ({error}); without RAY_ADDRESS one is started here"
            ) from None


def memory_for_workers() -> int:
    """Bytes that a cluster of this process gives its workers: of what is free when it starts, since Ray kills workers
    where 95 % of a machine is in use; its own share of the whole is not looked at by other programs."""
    return int(min(_MEMORY_SHARE * total_memory(), _FREE_SHARE * free_memory()))


def is_submitted() -> bool:
    """Whether this process is the driver of a job that `ray job submit` has started."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # Ray sets it for such drivers only


def on_running_cluster() -> bool:
    """Whether this process uses a cluster that it has not started, as a submitted job does."""
    if "RAY_ADDRESS" in os.environ:
        return True
    if "ray" not in sys.modules:  # importing it takes seconds
        return False
    import ray

    return bool(ray.is_initialized()) and not _own_cluster


def check_room(needs: Needs, what: str) -> None:
    """ConfigError if no node of a cluster of this process has room for one actor; others may grow: a warning."""
    import ray

    missing = missing_on(needs, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if missing is None:
        return
    if _own_cluster:
        raise ConfigError(f"no room for {what}: {missing}, of what is free now")
    _log.warning("no node has room for %s: %s; waiting for one that has", what, missing)


class _Holder:
    """An actor that lives as long as its job."""

    def ready(self) -> None:
        """Answers."""


@contextmanager
def only_job(what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the only right to the output `what` for the time of a block; another job that has it is waited for.

    Ray frees it when the job ends, however that happens. Without `RAY_ADDRESS`, which every submitted job has, no
    cluster is looked for: one of this process has no other jobs.
    """
    if "RAY_ADDRESS" not in os.environ:
        yield
        return
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
    """Variables that say where stores are, for workers of a cluster that this process has not started.

    No credentials: the dashboard shows a job's environment, and nodes have roles or secrets of their own. Empty under
    `ray job submit`: those workers have the environment of the job.
    """
    if is_submitted():
        return {}
    return {name: os.environ[name] for name in _STORE_VARIABLES if name in os.environ}
