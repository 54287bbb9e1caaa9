"""`simmerge init`: a directory to start in, from a list of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simmerge_ray.cli.places import path_argument


def init(
    directory: Annotated[Path, path_argument(metavar="DIR", help="where catalogue, probes and tasks go")],
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHECKPOINT...",
            help="PATH or TASK=PATH: directory, URI or hub id (hf://owner/name@revision), an adapter's too",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="the common ancestor; default: what the checkpoints themselves name")
    ] = None,
    probes: Annotated[
        list[str] | None,
        typer.Option(help="TASK=FILE of prompts: text, CSV, JSON, JSONL, Parquet, a data set on disk; repeatable"),
    ] = None,
    field: Annotated[str | None, typer.Option(help="where FILE has columns, that of the prompts")] = None,
    num_probes: Annotated[int, typer.Option(min=1, help="of each task, a sample")] = 64,
) -> None:
    """Start a directory: catalogue, probes and templates with comments, from a list of checkpoints.

    Later, `simmerge init work --probes TASK=FILE` adds probes. No file that exists is overwritten.
    """
    from simmerge_ray.pipelines.starting import plan_start

    start = plan_start(directory, checkpoints or (), base, probes or (), field, num_probes)
    start.write()
    for line in start.lines:
        typer.echo(line)
