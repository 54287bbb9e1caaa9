"""Databases for the tests of the event log: SQLite in a file, and a PostgreSQL server of the tests' own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from simmerge_ray.service.log.database import upgrade_database
from tests.postgres import new_database, programs, running_server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a server in a temporary directory, without the name of a database."""
    if programs() is None:
        pytest.skip("PostgreSQL is not installed (no initdb): apt-get install postgresql")
    with running_server(fsync=False) as url:  # the server is not killed here, only its clients
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/log.db"
    return new_database(request.getfixturevalue("postgres_server"))


@pytest.fixture
def database(empty_database: str) -> str:
    """URL of a database with the present schema."""
    upgrade_database(empty_database)
    return empty_database
