"""`simmerge serve`: the service of a run, until Ctrl-C; on Ray Serve, or with `--no-ray` as one plain process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from simmerge_ray.base.config import ServeConfig
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.cli.options import with_config_options
from simmerge_ray.cli.places import path_argument
from simmerge_ray.service.http.listening import check_port


@with_config_options
def serve(
    config: ServeConfig,
    run: Annotated[
        Path | None, path_argument(help="directory of a finished run; without it name --selector and --signals")
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0, with --no-ray: any free one")] = 8000,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Ray Serve, or one plain process")] = True,
) -> None:
    """Serve a run over HTTP, dashboard included, until Ctrl-C."""
    if port == 0 and ray:
        raise ConfigError("--port 0 takes --no-ray: Ray Serve needs a port that is known")
    if run is not None:
        config = _of_run(RunLayout(run), config)
    if not ray or "RAY_ADDRESS" not in os.environ:
        check_port(host, port)  # before seconds of imports
    if not ray:
        from simmerge_ray.service.http.standalone import serve_alone

        serve_alone(config, host, port)
        return
    from simmerge_ray.base.progress import narrated

    with narrated(RunLayout(run).log if run else Path("simmerge.log")) as narrator:
        from simmerge_ray.on_ray.serve_app import run_service

        run_service(config, host, port, narrator)


def _of_run(layout: RunLayout[Path], config: ServeConfig) -> ServeConfig:
    """What the options leave open, from a run; ConfigError if that is not finished."""
    service = layout.root / "service"
    defaults: dict[str, Any] = {
        "selector": layout.selector,
        "signals": layout.signals,
        "catalogue": layout.catalogue if layout.catalogue.exists() else None,
        "probes": layout.probes if layout.probes.exists() else None,
        "registry": service / "selectors",
        "database": f"sqlite:///{(service / 'service.db').resolve()}",
    }
    for path in (layout.selector / "selector.json", layout.signals):
        if not path.exists():
            raise ConfigError(f"{path} is missing; {layout.root} is no finished run (`simmerge demo` makes one)")
    return config.model_copy(update={name: value for name, value in defaults.items() if getattr(config, name) is None})
