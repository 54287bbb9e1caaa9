"""Arguments of commands that are a path or a URI (`s3://`, `gs://`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from simmerge_ray.base.errors import InputError
from simmerge_ray.base.storage import RemotePath, as_place

if TYPE_CHECKING:
    PathOrUri: TypeAlias = Path | RemotePath
else:

    class PathOrUri:
        """What typer sees, which takes no unions: the name that `--help` shows; `place` makes the value."""


def place(text: str | Path) -> Path | RemotePath:
    """`parser` of an option or argument."""
    try:
        return as_place(text)
    except InputError as error:
        raise typer.BadParameter(str(error)) from None


def local_path(text: str | Path) -> Path:
    """`parser` of an option or argument that must lie on a filesystem."""
    path = place(text)
    if isinstance(path, RemotePath):
        raise typer.BadParameter(f"{text!r} is a URI; name a path of a filesystem (a cluster: that every node sees)")
    return path


def place_option(*names: str, help: str, **rest: Any) -> Any:
    """`typer.Option` of a `PathOrUri`."""
    return typer.Option(*names, parser=place, metavar="PATH|URI", help=help, **rest)


def place_argument(help: str, **rest: Any) -> Any:
    """`typer.Argument` of a `PathOrUri`."""
    return typer.Argument(parser=place, help=help, **rest)


def path_option(*names: str, help: str, **rest: Any) -> Any:
    """`typer.Option` of a `Path`; a URI is refused."""
    return typer.Option(*names, parser=local_path, metavar="PATH", help=help, **rest)


def path_argument(help: str, **rest: Any) -> Any:
    """`typer.Argument` of a `Path`; a URI is refused."""
    return typer.Argument(parser=local_path, help=help, **rest)


CatalogueArgument = Annotated[
    PathOrUri, place_argument(metavar="CATALOGUE", help="catalogue YAML: base and checkpoints")
]
