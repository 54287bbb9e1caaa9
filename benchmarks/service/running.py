"""The service in a plain uvicorn process for benchmarks: started, waited for and killed."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path

import httpx

TOKEN = "benchmark-token-0123456789abcdef"
_START_S = 120.0


def _serve(arguments: list[str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from simmerge_ray.service.standalone import main

    sys.exit(main(arguments))


class PlainService:
    """`simmerge_ray.service.standalone` on one port, as often as it is started.

    Its processes are forked from one that has the modules in memory, so that a start costs what the service does and
    not the seconds that Python takes to import.

    Args:
        directory: for its tokens, registry and output.
    """

    def __init__(self, database: str, selector: Path, signals: Path, directory: Path, port: int, *more: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        tokens = directory / "tokens.yaml"
        tokens.write_text(f"- {{name: benchmark, role: admin, token: {TOKEN}, per_second: 1000000}}\n")
        tokens.chmod(0o600)
        given = {"database": database, "registry": directory / "registry", "signals": signals, "selector": selector}
        given |= {"tokens": tokens, "port": port}
        self._arguments = [f"--{name}={value}" for name, value in given.items()] + list(more)
        self._log = directory / "service.log"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["simmerge_ray.service.standalone"])
        self._process: multiprocessing.process.BaseProcess | None = None
        self.url = f"http://127.0.0.1:{port}"

    def start(self) -> None:
        """Does not wait."""
        arguments = (self._arguments, str(self._log))
        self._process = self._context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()

    def wait(self) -> float:
        """Until it is ready; how long that took. Raises RuntimeError with its output if it ends or takes too long."""
        started = time.monotonic()
        with httpx.Client(timeout=5) as client:
            while True:
                try:
                    if client.get(f"{self.url}/readyz").status_code == 200:
                        return time.monotonic() - started
                except httpx.TransportError:
                    pass
                gone = self._process is None or not self._process.is_alive()
                if gone or time.monotonic() - started > _START_S:
                    raise RuntimeError(f"the service is not ready:\n{self._log.read_text()[-4000:]}")
                time.sleep(0.02)

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
