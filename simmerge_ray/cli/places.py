"""Arguments of commands that are a path or a URI (`s3://`, `gs://`)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

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


# Options and arguments of a `PathOrUri`, and of a `Path`, which refuse URIs.
place_option = partial(typer.Option, parser=place, metavar="PATH|URI")
place_argument = partial(typer.Argument, parser=place)
path_option = partial(typer.Option, parser=local_path, metavar="PATH")
path_argument = partial(typer.Argument, parser=local_path)

CatalogueArgument = Annotated[
    PathOrUri, place_argument(metavar="CATALOGUE", help="catalogue YAML: base and checkpoints")
]
