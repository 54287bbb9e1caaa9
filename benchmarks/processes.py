"""Commands as processes of their own, to be interrupted by the campaigns of `make soak`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from simmerge_ray.base.runs import RunLayout

ROOT = Path(__file__).parents[1]

# Two idle agents of a killed head try for a minute to tell it that they end (see `ray_session`).
AGENTS = ("DashboardAgent", "RuntimeEnvAgent", "dashboard/agent.py", "runtime_env/agent/main.py")


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """`python ARGUMENTS` in the repository; what it prints can be read line by line."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_tiny_demo(layout: RunLayout) -> subprocess.Popen[str]:
    """The tiny demo on a cluster of its own."""
    # A relative path, as users give it: workers of Ray may run in another directory.
    return start("-m", "tests.e2e.tiny_demo", os.path.relpath(layout.root, ROOT))


def interrupt(process: subprocess.Popen[str], number: int) -> tuple[int, list[psutil.Process]]:
    """Send the signal, wait for the end; returns the exit code and the processes that the run had started."""
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    return process.returncode, family


def is_agent(process: psutil.Process) -> bool:
    try:
        return any(agent in part for part in process.cmdline() for agent in AGENTS)
    except psutil.NoSuchProcess:
        return False


def assert_gone(family: list[psutil.Process], seconds: float) -> None:
    _, alive = psutil.wait_procs(family, timeout=seconds)
    assert not alive, f"left behind: {alive}"
