"""`simmerge db ...`: look after the service's database. No torch, no Ray."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from simmerge_ray.base.errors import ConfigError, StoreError, problem_list

db_app = typer.Typer(
    help="The service's database: upgrade its tables, inspect and check it, back it up, export it, prune it.",
    no_args_is_help=True,
)

# From the environment as well: the list of processes shows options, and a URL may hold a password.
Url = Annotated[
    str,
    typer.Argument(
        metavar="DATABASE_URL",
        envvar="SIMMERGE_DATABASE",
        help="sqlite:////path/to/service.db or postgresql://user@host/name",
    ),
]
RestoreFile = Annotated[Path | None, typer.Argument(metavar="FILE", help="as `simmerge db backup` wrote it")]
ExportFile = Annotated[Path | None, typer.Argument(metavar="FILE", help="new file")]
BackupFile = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", help="new file; one that ends in .parquet can be restored into either database"),
]
Namespace = Annotated[str, typer.Option(help="of the service")]


def _url_and_file(url: str, file: Path | None) -> tuple[str, Path]:
    """FILE alone is enough where the environment names the database: the parser has taken it for the URL then."""
    known = os.environ.get("SIMMERGE_DATABASE")
    if file is not None:
        return url, file
    if known and url != known:
        return known, Path(url)
    raise ConfigError("name the FILE, too: simmerge db COMMAND [DATABASE_URL] FILE")


@db_app.command("upgrade")
def upgrade_command(url: Url) -> None:
    """Upgrade a database, which may be empty, to this program's tables; its events stay."""
    from simmerge_ray.service.log.database import SCHEMA_VERSION, upgrade_database

    upgrade_database(url)
    typer.echo(f"the database has the schema version {SCHEMA_VERSION}")


@db_app.command("status")
def status_command(url: Url, as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False) -> None:
    """Version of the schema, namespaces with their events and snapshots, size."""
    from simmerge_ray.service.log.database import SCHEMA_VERSION
    from simmerge_ray.service.log.maintenance import status

    found = status(url)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    version = found.schema or "none"
    if found.schema != SCHEMA_VERSION:
        version += f" (this program needs {SCHEMA_VERSION}: run `simmerge db upgrade`)"
    typer.echo(f"{found.url}: schema version {version}, {_size(found.size_bytes)}")
    for one in found.namespaces:
        typer.echo(f"namespace {one.namespace}: {one.head} events, {_day(one.first_at)} to {_day(one.last_at)}")
        for kind, count in one.counts.items():
            typer.echo(f"  {kind:<16} {count:>10}")
        newest = f", the newest of event {one.snapshots[-1]}" if one.snapshots else ""
        typer.echo(f"  {len(one.snapshots)} snapshots of {_size(one.snapshot_bytes)}{newest}")


@db_app.command("check")
def check_command(url: Url) -> None:
    """Read and fold every event; exit code 1 with what is damaged and what to do, if a service could not start."""
    from simmerge_ray.service.log.check import check_database

    problems = []
    for report in check_database(url):
        state = f"{len(report.problems)} problems" if report.problems else "sound"
        typer.echo(f"namespace {report.namespace}: {report.num_events} events, {state}")
        for note in report.notes:
            typer.echo(f"  {note}")
        problems += [f"namespace {report.namespace}: {problem}" for problem in report.problems]
    if problems:
        raise StoreError(problem_list("", problems))


@db_app.command("backup")
def backup_command(url: Url, file: BackupFile = None) -> None:
    """Write one consistent state of all namespaces to a file, while services go on."""
    from simmerge_ray.service.log.maintenance import backup

    url, target = _url_and_file(url, file)
    heads = backup(url, target)
    typer.echo(f"{target} holds {_heads(heads)}")


@db_app.command("restore")
def restore_command(url: Url, file: RestoreFile = None) -> None:
    """Fill an empty database from a backup; a namespace that has events is refused."""
    from simmerge_ray.service.log.maintenance import restore

    url, source = _url_and_file(url, file)
    heads = restore(url, source)
    typer.echo(f"restored {_heads(heads)}")


@db_app.command("export")
def export_command(
    url: Url,
    file: ExportFile = None,
    table: Annotated[
        Literal["decisions", "events"],
        typer.Option(help="decisions with their rewards, one a row, or the events as they are"),
    ] = "decisions",
    namespace: Namespace = "default",
) -> None:
    """Write decisions with their rewards, or raw events, for other programs."""
    from simmerge_ray.service.log.maintenance import export_decisions, export_events

    url, target = _url_and_file(url, file)
    if table == "events":
        count = export_events(url, namespace, target)
    else:
        count = export_decisions(url, namespace, target, time.time())
    typer.echo(f"{target} has {count} {table}")


@db_app.command("prune")
def prune_command(
    url: Url,
    older_than_days: Annotated[float, typer.Option(min=0, help="closed at least this long ago")] = 90.0,
    keep_snapshots: Annotated[int, typer.Option(min=0, help="the newest ones")] = 8,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only show what would be removed")] = False,
    namespace: Namespace = "default",
) -> None:
    """Remove what nothing can be learned from: features of decisions that were closed without a reward."""
    from simmerge_ray.service.log.maintenance import prune

    gone = prune(url, namespace, time.time() - older_than_days * 86400, keep_snapshots, dry_run)
    would = "would remove" if dry_run else "removed"
    typer.echo(
        f"{would} features of {gone.decisions} decisions ({_size(gone.bytes)}) and {gone.snapshots} snapshots; "
        "every event stays"
    )


def _heads(heads: dict[str, int]) -> str:
    return ", ".join(f"{count} events of {name}" for name, count in heads.items()) or "no events"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _day(at: float | None) -> str:
    return "-" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
