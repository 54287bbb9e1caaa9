"""Commands as processes of their own, to be interrupted by the campaigns of `make soak`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
# Two idle agents of a killed head try for a minute to tell it that they end (see `ray_session`).
AGENTS = ("DashboardAgent", "RuntimeEnvAgent", "dashboard/agent.py", "runtime_env/agent/main.py")


def start(*arguments: str | Path | int) -> subprocess.Popen[str]:
    """`python ARGUMENTS` in the repository; what it prints can be read line by line."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def family_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that it has started."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def interrupt(process: subprocess.Popen[str], number: int) -> tuple[int, list[psutil.Process]]:
    """Send the signal, wait for the end; returns the exit code and the processes that the run had started."""
    family = family_of(process)
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode, family


def is_one_of(process: psutil.Process, names: Iterable[str]) -> bool:
    """Whether its command line holds one of the names."""
    with suppress(psutil.NoSuchProcess):
        command = process.cmdline()
        return any(name in part for name in names for part in command)
    return False


def assert_gone(family: Iterable[psutil.Process], seconds: float) -> None:
    """Wait for all to end, for Ray's agents two minutes."""
    agents = [one for one in family if is_one_of(one, AGENTS)]
    for processes, longest in (([one for one in family if one not in agents], seconds), (agents, 120)):
        _, alive = psutil.wait_procs(processes, timeout=longest)
        assert not alive, f"left behind: {alive}"
