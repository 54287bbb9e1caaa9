"""`simmerge push`: a merge to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simmerge_ray.cli.places import path_argument


def push(
    merged: Annotated[Path, path_argument(metavar="MERGED", help="directory of a merge that was made here")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="of the hub; made if it is not there")],
    private: Annotated[bool, typer.Option("--private", help="make it visible to its owner alone")] = False,
) -> None:
    """Send a merge to the hub: weights, tokenizer, recipe, and its card with what it keeps, its sources and licences.

    HF_TOKEN, or `hf auth login`, says who sends it, and HF_ENDPOINT where it goes. Files that are there already are not
    sent again.
    """
    from simmerge_ray.pipelines.push import push_merge

    typer.echo(f"pushed: {push_merge(merged, repository, private)}")
