"""`simmerge serve`: the service of a run, until Ctrl-C."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    run: Annotated[Path, typer.Argument(help="directory of the run")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option(min=1)] = 1,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="under load; default: as many as --replicas")] = None,
    database: Annotated[str | None, typer.Option(help="URL of the event log; default: SQLite in RUN/service")] = None,
    namespace: Annotated[str, typer.Option(help="services of one namespace share what they learn")] = "default",
    tokens: Annotated[
        Path | None, typer.Option(help="YAML file of tokens and roles; default: one admin token that is made")
    ] = None,
) -> None:
    """Serve a run over HTTP with Ray Serve, dashboard included, until Ctrl-C."""
    from simmerge_ray.base.config import ServeConfig, check_config
    from simmerge_ray.base.errors import ConfigError
    from simmerge_ray.base.runs import RunLayout

    layout = RunLayout(run)
    values = {
        "selector": layout.selector,
        "signals": layout.signals,
        "catalogue": layout.catalogue if layout.catalogue.exists() else None,
        "out": run / "service",
        "database": database,
        "namespace": namespace,
        "tokens": tokens,
        "host": host,
        "port": port,
        "num_replicas": replicas,
        "max_replicas": max_replicas,
    }
    config = check_config(ServeConfig, values, "options")
    for path in (layout.selector / "selector.json", layout.signals):
        if not path.exists():
            raise ConfigError(f"{path} is missing; {run} is no finished run (`simmerge demo {run}` makes one)")
    from simmerge_ray.base.progress import narrated

    with narrated(layout.log) as narrator:
        from simmerge_ray.on_ray.serve_app import run_service

        run_service(config, narrator)
