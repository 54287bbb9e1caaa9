"""The service in a process of its own, for tests that need a real one: `with running(files, root) as live: ...`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.unit.service.published import PublishedFiles

TOKEN = "a-token-of-the-tests-0123456789"


@dataclass
class Live:
    """url of the service. process: kill it as you like. log: what it wrote."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def client(self, token: str | None = TOKEN) -> httpx.Client:
        """A client with a token; close it."""
        headers = {"authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)


def start(files: PublishedFiles, root: Path, database: str | None = None) -> Live:
    """Start it; it listens when this returns."""
    log = root / "service.log"
    command = [sys.executable, "-m", "simmerge_ray", "serve", "--no-ray", "--port", "0"]
    command += ["--database", database or f"sqlite:///{root}/service.db", "--registry", str(root / "registry")]
    command += ["--signals", str(files.signals), "--selector", str(files.selector)]
    environment = os.environ | {"SIMMERGE_TOKEN": TOKEN}
    with log.open("a") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("listening on "):
        process.wait(20)
        raise RuntimeError(f"the service did not start: {line}{log.read_text()[-2000:]}")
    return Live(line.split()[2], process, log)


def wait_ready(live: Live, seconds: float = 60) -> None:
    """Until it can decide."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if httpx.get(f"{live.url}/readyz", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline or live.process.poll() is not None:
            raise RuntimeError(f"the service is not ready: {live.log.read_text()[-2000:]}")
        time.sleep(0.05)


@contextmanager
def running(files: PublishedFiles, root: Path, database: str | None = None) -> Iterator[Live]:
    """A service that is ready, ended afterwards."""
    live = start(files, root, database)
    try:
        wait_ready(live)
        yield live
    finally:
        live.process.terminate()
        live.process.wait(20)
