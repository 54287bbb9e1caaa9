"""Fixtures shared by all tests: an offline environment, tiny checkpoints, one Ray cluster for the session."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import pytest

from simmerge_ray.service.http.listening import free_port
from tests.leftovers import MARK, leftovers, mark_session
from tests.object_store import credentials, make_bucket, s3_server

# Where the S3 server of the tests will listen (tests/object_store.py). Ray's workers have the environment of the
# process that started the cluster, so it is known before the server is there.
_S3_PORT = free_port()

mark_session()
# Before any library is imported. A private home for Ray's token: behaviour must not depend on what lies in ~/.ray.
_HOME = tempfile.mkdtemp(prefix="simmerge-test-home-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",  # the default is 15: workers would wait for whatever else the machine does
    TUNE_DISABLE_SIGINT_HANDLER="1",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN="simmerge-ray-tests-0123456789abcdef",
    HOME=_HOME,
    SIMMERGE_CACHE_DIR=f"{_HOME}/cache",
    # What vLLM finds out about an architecture in a process of its own, six seconds each time: kept as it is for users.
    VLLM_CACHE_ROOT=f"{tempfile.gettempdir()}/simmerge-tests-vllm",
    **credentials(_S3_PORT),
    PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # submitted jobs call `python`
)


ENGINES = ("test_vllm_evaluator.py", "test_vllm_engines.py", "test_vllm_harness.py")
# They start clusters or services of their own, and wait for them much of the time.
OWN_CLUSTERS = (
    "test_autoscaling.py",
    "test_namespaces.py",
    "test_nodes.py",
    "test_one_machine.py",
    "test_serve_kills.py",
)


def scope(nodeid: str) -> str:
    """What runs on one worker, one after the other: all that needs the session's cluster, or else a file."""
    file = nodeid.split("::")[0]
    on_cluster = file.startswith(("tests/on_ray", "tests/e2e")) and not file.endswith(ENGINES + OWN_CLUSTERS)
    return "cluster" if on_cluster else file


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`pytest -n 2`: one worker takes what needs the cluster, which is half of all; the other the engines, then file by
    file. Clusters of their own come last, on whichever worker is free: two at once beside each other only at the end.
    """

    def turn(item: pytest.Item) -> int:
        name = scope(item.nodeid)
        return 0 if name == "cluster" else 1 if name.endswith(ENGINES) else 3 if name.endswith(OWN_CLUSTERS) else 2

    items.sort(key=turn)


def pytest_collection_finish() -> None:
    """All that was imported and collected stays to the end: no later collection of garbage looks at it again. vLLM asks
    for nine at each start and end of an engine, half a second each.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The order and the scopes from above. (`--dist loadgroup` says the same, but xdist 3.8 loses groups with pytest
    9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """No process of Ray, Serve, HAProxy or anything else that the tests started outlives them."""
    if hasattr(session.config, "workerinput"):
        return  # the controller looks, when all workers have ended
    if left := leftovers(os.environ[MARK]):
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line("")
        for line in left:
            reporter.write_line(f"left behind by the tests: {line}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


# No test depends on timing: the first call of a compiled loop takes a second. At a desk hypothesis draws other examples
# every time; a gate says whether a change is good, not whether it was lucky.
hypothesis.settings.register_profile("suite", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def catalogue_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three noisy copies of it with probes and tasks (tests/tiny.py); read only."""
    from tests import tiny

    return tiny.make_catalogue(tmp_path_factory.mktemp("catalogue"))


@pytest.fixture(scope="session")
def catalogue(catalogue_path: Path):
    from simmerge_ray.checkpoints.catalogue import load_catalogue

    return load_catalogue(catalogue_path)


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server of the session."""
    with s3_server(_S3_PORT, tmp_path_factory.mktemp("s3") / "server.log") as url:
        yield url


@pytest.fixture
def bucket(s3_url: str) -> str:
    """URI of a new bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    make_bucket(s3_url, name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """One local cluster of two CPUs for all tests that need Ray, with token authentication; its dashboard's URL."""
    import ray
    from ray._private.parameter import RayParams

    # The agent that starts submitted jobs has a fixed port. Beside another cluster on the machine it would have none,
    # and every job would be refused; None takes a free one, as Ray's own cluster_utils does.
    free_agent_port = partialmethod(RayParams.__init__, dashboard_agent_listen_port=None)
    with mock.patch.object(RayParams, "__init__", free_agent_port):
        context = ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=True,
            dashboard_port=free_port(),
            log_to_driver=False,
            logging_level="warning",
            object_store_memory=400_000_000,
            _system_config={"metrics_report_interval_ms": 1000},  # ten seconds otherwise
        )
    yield f"http://{context.dashboard_url}"
    ray.shutdown()
