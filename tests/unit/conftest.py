"""Commands and jobs in this process: a new interpreter takes a second, and most tests of a command need none."""

from __future__ import annotations

import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.job_lines import read_last_line

JOBS = Path(__file__).parents[2] / "jobs"
Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def simmerge(capfd, monkeypatch) -> Iterator[Run]:
    """`simmerge("search", path, ...)` is `simmerge search PATH ...`, with the exit codes of `run_command`."""
    from simmerge_ray.cli.app import app, run_command

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: Any, cwd: Any = None) -> CompletedProcess[str]:
        command = [str(argument) for argument in arguments]
        capfd.readouterr()
        with monkeypatch.context() as context:
            if cwd is not None:
                context.chdir(cwd)
            with pytest.raises(SystemExit) as caught:
                run_command(lambda: app(command, prog_name="simmerge"))
        return CompletedProcess(command, int(caught.value.code or 0), *capfd.readouterr())

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def run_job_script(monkeypatch, capsys) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Runs a job in this process; exit code, what the last line says, all that was printed."""
    before = signal.getsignal(signal.SIGTERM)

    def run(name: str, *arguments: Any) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(JOBS / f"{name}.py"), run_name="__main__")
        signal.signal(signal.SIGTERM, before)
        output = capsys.readouterr().out
        return int(ended.value.code or 0), read_last_line(output), output

    return run
