"""The service as processes of its own, for benchmarks and tests: started, waited for, killed in parts and ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from simmerge_ray.base.config import ServeConfig

TOKEN = "benchmark-token-0123456789abcdef"
_START_S = 300.0  # replicas import torch, maybe on cores that others use as well
_END_S = 120.0  # two idle agents of Ray try for a minute to tell a dead head that they end


def write_tokens(directory: Path) -> Path:
    """A file with one admin token, `TOKEN`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokens = directory / "tokens.yaml"
    tokens.write_text(f"- {{name: benchmark, role: admin, token: {TOKEN}}}\n")
    tokens.chmod(0o600)
    return tokens


@contextmanager
def database_of(given: str, directory: Path) -> Iterator[str]:
    """URL of an empty database: of `sqlite` a file in `directory`, of `postgresql` a new server; else it is a URL."""
    from tests.postgres import new_database, running_server

    if given == "sqlite":
        yield f"sqlite:///{directory}/log.db"
    elif given == "postgresql":
        with running_server(fsync=True) as server:
            yield new_database(server)
    else:
        yield given


def wait_until(condition: Callable[[], bool], what: str, seconds: float = _START_S) -> None:
    """Raises RuntimeError with what did not happen in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"within {seconds:.0f} s it did not happen that {what}")
        time.sleep(0.1)


def is_ready(url: str) -> bool:
    """Whether the service, or a replica of it, answers that it can decide."""
    try:
        return httpx.get(f"{url}/readyz", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def _serve(config: ServeConfig, port: int, log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from simmerge_ray.service.http.standalone import serve_alone

    serve_alone(config, "127.0.0.1", port)


class PlainService:
    """`simmerge serve --no-ray` on one port, as often as it is started.

    Its processes are forked from one that has the modules in memory, so that a start costs what the service does and
    not the seconds that Python takes to import.

    Args:
        directory: for its tokens, registry and output. config: the rest.
    """

    def __init__(self, config: ServeConfig, directory: Path, port: int) -> None:
        own = {"registry": directory / "registry", "tokens": write_tokens(directory)}
        self._config, self._port = config.model_copy(update=own), port
        self._log = directory / "service.log"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["simmerge_ray.service.http.standalone"])
        self._process: multiprocessing.process.BaseProcess | None = None
        self.url = f"http://127.0.0.1:{port}"

    def start(self) -> None:
        """Does not wait."""
        arguments = (self._config, self._port, str(self._log))
        self._process = self._context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()

    def wait(self) -> float:
        """Until it is ready; how long that took. Raises RuntimeError with its output if it ends or takes too long."""
        started = time.monotonic()
        while not is_ready(self.url):
            gone = self._process is None or not self._process.is_alive()
            if gone or time.monotonic() - started > _START_S:
                raise RuntimeError(f"the service is not ready:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.02)
        return time.monotonic() - started

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


class RayService:
    """`simmerge serve RUN` with the Ray cluster that it starts.

    All its processes are of one session in the kernel's sense, so they are found also after their parents were killed.

    Args:
        output: what it prints is appended there. more: options. Its environment is this one without SIMMERGE_*.
    """

    def __init__(self, run: Path, output: Path, port: int, *more: str) -> None:
        program = Path(sys.executable).with_name("simmerge")
        self._command = [str(program), "serve", str(run), f"--port={port}", *more]
        self._output = output
        self._begins = 0  # of what it printed since it was started last
        self.process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{port}"

    def start(self) -> None:
        """Does not wait."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SIMMERGE_")}
        environment["COLUMNS"] = "1000"  # so that no line is broken
        with self._output.open("ab") as out:
            self._begins = out.tell()
            self.process = subprocess.Popen(
                self._command, stdout=out, stderr=out, env=environment, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers. Raises RuntimeError with its output if it ends or takes too long."""
        deadline = time.monotonic() + _START_S
        while not ("curl" in self.printed() and is_ready(self.url)):
            if self.process is None or self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the service is not ready:\n{self.printed()[-4000:]}")
            time.sleep(0.1)

    def printed(self) -> str:
        """Since the last start."""
        with self._output.open("rb") as out:
            out.seek(self._begins)
            return out.read().decode(errors="replace")

    def processes(self) -> dict[int, str]:
        """Command lines of all processes that it, its Ray and their children started and that live."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (place / "stat").read_text().rsplit(")", 1)[1].split()[:4]
                command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except (OSError, ValueError):
                continue
            if self.process is not None and int(session) == self.process.pid and state not in "ZX":
                found[int(place.name)] = command
        return found

    def pids(self, name: str) -> list[int]:
        """Processes with this in their title or program's path."""
        return [pid for pid, command in self.processes().items() if name in command.split(" -", 1)[0]]

    def address(self) -> str:
        """Of its Ray cluster."""
        commands = [command for command in self.processes().values() if "/raylet/raylet " in command]
        return next(word for word in commands[0].split() if word.startswith("--gcs-address=")).partition("=")[2]

    def kill(self) -> None:
        """kill -9 of every process, until there is none."""
        while processes := self.processes():
            for pid in processes:
                kill_9(pid)
            time.sleep(0.02)
        if self.process is not None:
            self.process.wait()
            self.process = None  # its number may be that of somebody else from now on

    def stop(self) -> int:
        """As Ctrl-C does; the exit code. Raises RuntimeError where processes are left; they are killed then."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(_END_S)
            wait_until(lambda: not self.processes(), "all processes of the service ended", _END_S)
        except (subprocess.TimeoutExpired, RuntimeError) as error:
            left = self.processes()
            self.kill()
            raise RuntimeError(f"{error}: {left}") from None
        self.process = None
        return code


def kill_9(pid: int) -> None:
    """A process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
