"""`simmerge cluster ...`: look after the files of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simmerge_ray.base.errors import ConfigError

cluster_app = typer.Typer(
    help="Files of a cluster: check them before `ray up` or `kubectl apply`.", no_args_is_help=True
)


@cluster_app.callback()
def _group() -> None:
    """A group, though it has one command."""


@cluster_app.command("check")
def check_cluster_files(
    files: Annotated[list[Path], typer.Argument(help="of the cluster launcher, of KubeRay, or a Serve config")],
) -> None:
    """Look for what `ray up` and `kubectl apply` would take and nobody wants.

    Misspelt fields, limits that contradict each other, resources that nothing asks for, models that no node holds, Ray
    without its token, secrets in the file, pods that run as root.
    """
    from simmerge_ray.on_ray.cluster_files import check_cluster_file

    total = 0
    for path in files:
        try:
            found = check_cluster_file(path)
        except ConfigError as error:  # the other files are looked at all the same
            found = [str(error).removeprefix(f"{path} ")]
        total += len(found)
        for problem in found:
            typer.echo(f"{path}: {problem}", err=True)
        if not found:
            typer.echo(f"{path}: fine")
    if total:
        plural = "s" if len(files) > 1 else ""
        raise ConfigError(f"{total} problem{'s' if total > 1 else ''} in {len(files)} file{plural}")
