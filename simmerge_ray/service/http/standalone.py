"""The service in one plain process, without Ray: `python -m simmerge_ray.service.http.standalone --help`."""

from __future__ import annotations

import argparse
import logging
import resource
import socket
import sys
from pathlib import Path

import uvicorn
from sqlalchemy.engine import make_url

from simmerge_ray.base.errors import ConfigError, InputError, SimmergeError
from simmerge_ray.service.http.access import Access, new_token, read_access, single
from simmerge_ray.service.http.api import create_app
from simmerge_ray.service.http.metrics import PrometheusMetrics
from simmerge_ray.service.http.slow_clients import impatient
from simmerge_ray.service.learner import Learner, LearnerSettings
from simmerge_ray.service.log.database import make_engine, upgrade_database

_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "lustre", "beegfs", "fuse.sshfs", "efs")


def prepare_database(url: str) -> None:
    """Bring an embedded database, maybe an absent one, to the present schema; others are left to `simmerge db upgrade`.

    Raises:
        ConfigError: a SQLite file on a network filesystem, where its locks do not hold. StoreError: it cannot be made.
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
    found, kind = -1, None
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) > 2:
            place = Path(fields[1].replace("\\040", " "))
            if (place == path or place in path.parents) and len(place.parts) >= found:
                found, kind = len(place.parts), fields[2]
    return kind


def access_or_new(tokens: Path | None) -> tuple[Access, str | None]:
    """The configured tokens, or one that is made now and told."""
    access = read_access(tokens)
    if access is not None:
        return access, None
    token = new_token()
    return single(token), token


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", required=True, help="sqlite:////path/service.db or postgresql://...")
    parser.add_argument("--registry", type=Path, required=True, help="directory of published selectors")
    parser.add_argument("--signals", type=Path, required=True, help="signal table")
    parser.add_argument("--selector", type=Path, help="selector to begin with")
    parser.add_argument("--catalogue", type=Path, help="catalogue, for better plans")
    parser.add_argument("--signatures", help="default with a catalogue: `signatures` beside the table")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--floor", type=float, default=0.02, help="probability that every arm is played with at least")
    parser.add_argument("--tokens", type=Path, help="YAML file; default: the environment, or one that is made now")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--snapshot-every", type=int, default=1000, help="events")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    try:
        access, token = access_or_new(given.tokens)
        signatures = given.signatures or (str(given.signals.parent / "signatures") if given.catalogue else None)
        settings = LearnerSettings(
            database=given.database,
            registry=given.registry,
            signals=given.signals,
            selector=given.selector,
            catalogue=given.catalogue,
            signatures=signatures,
            namespace=given.namespace,
            floor=given.floor,
            snapshot_every=given.snapshot_every,
        )
        learner = Learner(settings)  # it reads the artifacts: nothing is made where one is wrong
        prepare_database(settings.database)
        app = create_app(lambda: learner, access, PrometheusMetrics())
        _serve(app, given.host, given.port, token)
    except SimmergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def _serve(app: object, host: str, port: int, token: str | None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # every connection is a file
    try:
        listening = socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    config = uvicorn.Config(app, http=impatient(), log_level="warning", access_log=False)  # type: ignore[arg-type]
    address = f"http://{host}:{listening.getsockname()[1]}"
    print(f"listening on {address}" + (f" token {token}" if token else ""), flush=True)
    with listening:
        uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    sys.exit(main())
