"""The service in one plain process, without Ray (`simmerge serve --no-ray`), and what both ways of serving prepare."""

from __future__ import annotations

import logging
import resource
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
import yaml
from sqlalchemy.engine import make_url

from simmerge_ray.base.config import ServeConfig, ServiceConfig
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.storage import read_text, write_atomically
from simmerge_ray.base.yaml_text import parse_yaml
from simmerge_ray.service.http.access import new_token, read_access
from simmerge_ray.service.http.api import create_app
from simmerge_ray.service.http.listening import open_port
from simmerge_ray.service.http.slow_clients import impatient
from simmerge_ray.service.learner import Learner
from simmerge_ray.service.log.database import make_engine, upgrade_database
from simmerge_ray.service.metrics import PrometheusMetrics

GRACE_S = 2  # for requests that run when a service ends
_TOKENS = "tokens.yaml"
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "lustre", "beegfs", "fuse.sshfs", "efs")


def prepare_database(url: str) -> None:
    """Upgrade an embedded database, or make it; others are left to `simmerge db upgrade`.
    Raises ConfigError: a SQLite file on a network filesystem, where its locks do not hold. StoreError: it cannot be
    made.
    """
    make_engine(url).dispose()
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return
    path = Path(parsed.database or "").absolute()
    kind = filesystem_of(path, Path("/proc/mounts").read_text())
    if kind in _NETWORK:
        raise ConfigError(f"{path} is on a network filesystem ({kind}), where SQLite loses events: use PostgreSQL")
    path.parent.mkdir(parents=True, exist_ok=True)
    upgrade_database(url)


def filesystem_of(path: Path, mounts: str) -> str | None:
    """Kind of the filesystem that a path lies on, by the lines of /proc/mounts."""
    lines = [fields for line in mounts.splitlines() if len(fields := line.split()) > 2]
    kinds = {Path(place.replace("\\040", " ")): kind for _, place, kind, *_ in lines}  # the last mount hides others
    return next((kinds[place] for place in (path, *path.parents) if place in kinds), None)


def completed(config: ServeConfig) -> tuple[ServiceConfig, str | None]:
    """The settings with everything that follows from others, and a token to show where none was configured.
    Raises ConfigError: a setting is missing, or the file of the token is damaged.
    """
    signals, database, registry, tokens = config.signals, config.database, config.registry, config.tokens
    if signals is None or database is None or registry is None:
        raise ConfigError("name a run, or --signals, --database and --registry")
    token = None
    if read_access(tokens) is None:  # neither a file nor, here and on the replicas of a Ray of our own, the environment
        tokens, token = _own_token(registry.resolve().parent / _TOKENS)
    values = config.model_dump() | {"tokens": tokens}
    resolved = {name: value.resolve() for name, value in values.items() if isinstance(value, Path)}
    return ServiceConfig(**values | resolved), token


def _own_token(path: Path) -> tuple[Path, str]:
    """A file with one admin token, which only this user can read; it stays, so that links work after a restart."""
    if not path.exists():
        entry = [{"name": "owner", "role": "admin", "token": new_token()}]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, yaml.safe_dump(entry).encode())
        path.chmod(0o600)
    try:
        return path, str(parse_yaml(read_text(path))[0]["token"])
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(f"{path} is damaged; delete it, and a new token is made") from None


def serve_alone(config: ServeConfig, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C; the first line of the output is the address. port: 0 takes any free one."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    service, token = completed(config)
    access = read_access(service.tokens)
    assert access is not None
    learner = Learner(service)  # it reads the artifacts: nothing is made where one is wrong
    prepare_database(service.database)
    app = create_app(lambda: learner, access, PrometheusMetrics())
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # every connection is a file
    listening = open_port(host, port)
    address = f"http://{host}:{listening.getsockname()[1]}"
    print(f"listening on {address}" + (f" token {token}" if token else ""), flush=True)
    with listening, suppress(KeyboardInterrupt):  # uvicorn raises the signal again when it has shut down
        options: dict[str, Any] = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": GRACE_S}
        _Server(uvicorn.Config(app, http=impatient(), **options)).run(sockets=[listening])


class _Server(uvicorn.Server):
    """It says that it ends; once more Ctrl-C, and it does at once."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            print(f"ending: requests that run have {GRACE_S} s; nothing that was answered is lost", file=sys.stderr)
        super().handle_exit(sig, frame)
