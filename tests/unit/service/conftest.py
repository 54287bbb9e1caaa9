"""Databases for the tests of the event log: SQLite in a file, and a PostgreSQL server of the tests' own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from simmerge_ray.errors import StoreError
from simmerge_ray.service.database import make_engine, store_errors, upgrade_database
from tests.conftest import free_port


def _programs() -> Path | None:
    """The directory of Debian's PostgreSQL programs."""
    found = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    if (other := shutil.which("initdb")) is not None:
        found.append(Path(other).resolve().parent)
    return found[0] if found else None


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a server in a temporary directory, without the name of a database."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (no initdb): apt-get install postgresql")
    home = Path(tempfile.mkdtemp(prefix="simmerge-test-postgres-"))
    user = "nobody" if os.getuid() == 0 else None  # it refuses to run as root
    if user:
        shutil.chown(home, user)
    data, port = home / "data", free_port()
    create = [programs / "initdb", "-D", data, "-U", "simmerge", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"]
    subprocess.run(create, user=user, check=True, capture_output=True, cwd=home)
    serve = [programs / "postgres", "-D", data, "-k", home, "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    serve += ["-c", "fsync=off"]  # the server is not killed here, only its clients
    with (
        open(home / "log", "wb") as log,
        subprocess.Popen(serve, user=user, cwd=home, stderr=log, stdout=log) as server,
    ):
        url = f"postgresql://simmerge@127.0.0.1:{port}"
        try:
            _wait(url, server, home / "log")
            yield url
        finally:
            server.send_signal(signal.SIGINT)  # a fast shutdown: it does not wait for clients to leave
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
    shutil.rmtree(home, ignore_errors=True)


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    engine = make_engine(f"{url}/postgres")
    deadline = time.monotonic() + 120
    while True:
        try:
            with store_errors("connecting"), engine.connect():
                break
        except StoreError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL does not start: {log.read_text()}") from error
            time.sleep(0.2)
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a database without tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/log.db"
        return
    server = request.getfixturevalue("postgres_server")
    name = f"test_{uuid.uuid4().hex}"
    admin = make_engine(f"{server}/postgres").execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    admin.dispose()
    yield f"{server}/{name}"


@pytest.fixture
def database(empty_database: str) -> str:
    """URL of a database with the present schema."""
    upgrade_database(empty_database)
    return empty_database
