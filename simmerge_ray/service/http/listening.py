"""The port that a service listens on; where it is taken, who has it."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import socket
from contextlib import suppress
from pathlib import Path

from simmerge_ray.base.errors import ConfigError

_LISTENING = "0A"  # state of a socket in /proc/net/tcp
_MAX_COMMAND = 100
_HAPROXY = re.compile(r"haproxy .*?(/tmp/sr-\d+-[0-9a-f]+)/")  # of `simmerge serve`
LOCK = "lock"
# Out of the way of what takes ports unasked: Ray's workers (10002-19999), Serve's replicas (30000 and up) and the
# kernel, for connections (32768 and up). A port of theirs that is free now may be taken when it is opened.
_QUIET_PORTS = range(20000, 30000)
_random = random.SystemRandom()  # no seed of the caller's: two processes must not draw the same


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ConfigError: it cannot; the message says who has the port, where that is known."""
    try:
        return socket.create_server((host, port), backlog=2048)
    except OSError as error:
        problem = f"cannot listen on {host}:{port}: {error.strerror}"
        if error.errno == errno.EADDRINUSE:
            problem = f"port {port} is taken by {port_holder(port)}; end it, or name another --port"
        raise ConfigError(problem) from None


def check_port(host: str, port: int) -> None:
    """As `open_port`, and lets go of it. What a killed service left on its port passes: the next one ends it."""
    try:
        open_port(host, port).close()
    except ConfigError:
        left = _HAPROXY.search(port_holder(port))
        if left is None or not is_unused(Path(left.group(1))):
            raise


def free_port() -> int:
    """A port that is free on every interface, to be opened later, by whatever process."""
    while True:
        port = _random.choice(_QUIET_PORTS)
        with suppress(OSError), socket.create_server(("", port)):
            return port


def is_unused(place: Path) -> bool:
    """Whether the service that has its files there is gone; it holds a lock as long as it lives."""
    try:
        with open(place / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except OSError:  # it has taken its files with it
        return True


def port_holder(port: int) -> str:
    """Who listens on a port of this machine, for a message."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is of another user
            if any(os.readlink(one) in sockets for one in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                is_ours = re.search(r"\bsimmerge|/sr-\d+-", command)
                who = "a service of simmerge" if is_ours else "another program"
                return f"{who} (process {process.name}: {command[:_MAX_COMMAND]})"
    return "a program of another user"


def _listening_inodes(port: int) -> list[str]:
    found = []
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == _LISTENING and int(words[1].rsplit(":", 1)[1], 16) == port:
                    found.append(words[9])
    return found
