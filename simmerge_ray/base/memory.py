"""Memory of this machine, or of the container that this process may use."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
# Limit, use, and the caches in it that the kernel gives up, of cgroup v2 and v1.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def total_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_number(cgroup / limit, r"(\d+)") for limit, *_ in _CGROUPS]
    return min([total, *(limit for limit in limits if limit is not None)])


def free_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that new processes can take: what is free, and what the kernel would give up (caches of files)."""
    available = _number(_MEMINFO, r"^MemAvailable:\s+(\d+) kB")
    free = total_memory(cgroup) if available is None else available * 1024
    for limit, use, statistics, caches in _CGROUPS:
        most, used = _number(cgroup / limit, r"(\d+)"), _number(cgroup / use, r"(\d+)")
        if most is not None and used is not None:
            kept = _number(cgroup / statistics, rf"^{caches} (\d+)") or 0
            free = min(free, max(0, most - used + kept))
    return free


def _number(path: Path, pattern: str) -> int | None:
    """None: there is no such file, or it does not say (`max`)."""
    with suppress(OSError):
        if found := re.search(pattern, path.read_text(), re.MULTILINE):
            return int(found.group(1))
    return None
