"""Fixtures shared by all tests: an offline environment, tiny checkpoints, one Ray cluster for the session."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before any library is imported. A private home for Ray's token: behaviour must not depend on what lies in ~/.ray.
_HOME = tempfile.mkdtemp(prefix="simmerge-test-home-")
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN="simmerge-ray-tests-0123456789abcdef",
    HOME=_HOME,
)


@pytest.fixture(scope="session")
def catalogue_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three noisy copies of it with probes and tasks (tests/tiny.py); read only."""
    from tests import tiny

    return tiny.make_catalogue(tmp_path_factory.mktemp("catalogue"))


@pytest.fixture(scope="session")
def catalogue(catalogue_path: Path):
    from simmerge_ray.catalogue import load_catalogue

    return load_catalogue(catalogue_path)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster of two CPUs for all tests that need Ray."""
    from simmerge_ray.distributed.resources import ray_session

    with ray_session(num_cpus=2):
        yield
