"""A PostgreSQL server of one's own, in a temporary directory on a free port: for tests and benchmarks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import text

from simmerge_ray.base.errors import StoreError
from simmerge_ray.service.http.listening import free_port
from simmerge_ray.service.log.database import make_engine, store_errors


def programs() -> Path | None:
    """The directory of Debian's PostgreSQL programs; None where they are not installed."""
    found = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    if (other := shutil.which("initdb")) is not None:
        found.append(Path(other).resolve().parent)
    return found[0] if found else None


@contextmanager
def running_server(fsync: bool) -> Iterator[str]:
    """URL of a server, without the name of a database, until the block ends.

    Args:
        fsync: False is enough, and faster, where the server itself is not killed.

    Raises:
        RuntimeError: PostgreSQL is not installed, or does not start.
    """
    directory = programs()
    if directory is None:
        raise RuntimeError("PostgreSQL is not installed (no initdb): apt-get install postgresql")
    home = Path(tempfile.mkdtemp(prefix="simmerge-test-postgres-"))
    user = "nobody" if os.getuid() == 0 else None  # it refuses to run as root
    if user:
        shutil.chown(home, user)
    data, port = home / "data", free_port()
    create = [
        directory / "initdb",
        "-D",
        data,
        "-U",
        "simmerge",
        "-A",
        "trust",
        "--no-sync",
        "-E",
        "UTF8",
        "--locale=C",
    ]
    subprocess.run(create, user=user, check=True, capture_output=True, cwd=home)
    serve = [directory / "postgres", "-D", data, "-k", home, "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    serve += [] if fsync else ["-c", "fsync=off"]
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


def new_database(server: str) -> str:
    """URL of a new database, without tables, on a server."""
    name = f"test_{uuid.uuid4().hex}"
    admin = make_engine(f"{server}/postgres").execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return f"{server}/{name}"
