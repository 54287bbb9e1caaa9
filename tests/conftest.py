"""Fixtures shared by all tests: an offline environment, tiny checkpoints, one Ray cluster for the session."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
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

from tests.leftovers import MARK, leftovers, mark_session
from tests.object_store import credentials, make_bucket, s3_server


def free_port() -> int:
    """A port that is free now, outside the range that Ray gives to its workers (10002-19999)."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            if (port := int(probe.getsockname()[1])) >= 20000:
                return port


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
    **credentials(_S3_PORT),
    PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # submitted jobs call `python`
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`pytest -n 2`: what needs the cluster runs first and on one worker; the other takes the rest file by file, first
    the engines in its own process. (`--dist loadgroup` says the same, but xdist 3.8 loses groups with pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            alone = file.endswith(("test_vllm_evaluator.py", "test_vllm_engines.py", "test_vllm_harness.py"))
            return "cluster" if file.startswith(("tests/on_ray", "tests/e2e")) and not alone else file

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
