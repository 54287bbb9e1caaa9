"""Commands in this process: a new interpreter takes a second, and most tests of a command need none."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from subprocess import CompletedProcess
from typing import Any

import pytest

from simmerge_ray.cli.app import app, run_command

Invoke = Callable[..., CompletedProcess[str]]


@pytest.fixture
def invoke(capfd, monkeypatch) -> Iterator[Invoke]:
    """`invoke("search", path, ...)` is `simmerge search PATH ...`, with the exit codes of `run_command`."""
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
