"""Processes that a test session has started and left behind: every one inherits a mark in its environment."""

from __future__ import annotations

import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "TEST_SESSION_MARK"  # not SIMMERGE_...: some tests take those away
# Two idle agents of a killed head try for a minute to tell it that they end (see `ray_session`).
PATIENCE_S = 120.0


def mark_session() -> None:
    """Give this process, and all that it starts, the session's mark; workers of xdist have it from their controller."""
    os.environ.setdefault(MARK, uuid.uuid4().hex)


def marked_processes(mark: str, name: str = MARK) -> list[psutil.Process]:
    """Processes with a mark in their environment and what they have started, without this one and what it descends
    from, and without what has ended.
    """
    own = {os.getpid(), *(one.pid for one in psutil.Process().parents())}
    wanted, found = f"{name}={mark}".encode(), {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # gone meanwhile, or of another user
            if process.pid not in own and wanted in _environment(process.pid):
                # Ray's Python processes wipe theirs when they take a title; they are children of its raylets.
                found |= {one.pid: one for one in (process, *process.children(recursive=True))}
    return [process for process in found.values() if process.pid not in own and _is_running(process)]


def kill_marked(mark: str, name: str) -> None:
    """Kill -9 all of them, also what they start meanwhile, and wait for their ends."""
    while found := marked_processes(mark, name):
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=20)


def _environment(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def _is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _orphans_of_ray() -> list[psutil.Process]:
    """Processes with a title of Ray and no environment any more, whose parent has ended, in this kernel session."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            title = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            alone = process.ppid() == 1 and os.getsid(process.pid) == os.getsid(0)
            if alone and title.startswith(b"ray::") and not any(_environment(process.pid)):
                found.append(process)
    return found


def leftovers(mark: str, patience_s: float | None = None) -> list[str]:
    """What is still there when it has had time to end, as `pid command`."""
    end = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
    while (left := [*marked_processes(mark), *_orphans_of_ray()]) and time.monotonic() < end:
        time.sleep(0.5)
    return sorted(line for process in left if (line := _shown(process)))


def _shown(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:200]}"
    except psutil.NoSuchProcess:
        return ""
