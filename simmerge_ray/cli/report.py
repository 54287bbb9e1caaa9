"""`simmerge report`: the report of a run."""

from __future__ import annotations

from typing import Annotated

import typer

from simmerge_ray.cli.places import PathOrUri, place_argument


def report(run: Annotated[PathOrUri, place_argument(help="directory of the run")]) -> None:
    """Write report.md and its figures from the files of a run."""
    from simmerge_ray.base.runs import RunLayout
    from simmerge_ray.reports.run import write_report

    typer.echo(f"report written to {write_report(RunLayout(run))}")
