"""`simmerge demo`, `zoo` and `report`: the whole chain on small checkpoints, these alone, and the report of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simmerge_ray.base.runs import RunLayout
from simmerge_ray.cli.places import PathOrUri, place_argument


def demo(run: Annotated[Path, typer.Argument(help="directory of the run")] = Path("runs/demo")) -> None:
    """Run the whole chain on a small zoo: train, signals, search, selector, choices, merge, report."""
    from simmerge_ray.base.progress import narrated

    layout = RunLayout(run)
    with narrated(layout.log) as narrator:
        from simmerge_ray.pipelines.demo import closing_lines, run_demo

        run_demo(layout, narrator)
        narrator.print_lines(closing_lines(layout))


def zoo(run: Annotated[Path, typer.Argument(help="directory of the run; the zoo goes to RUN/zoo")]) -> None:
    """Train the demo's fine-tuned checkpoints, with probes and tasks."""
    from simmerge_ray.base.progress import narrated

    layout = RunLayout(run)
    with narrated(layout.log) as narrator:
        from simmerge_ray.pipelines.demo import zoo_stage

        zoo_stage(layout, narrator)


def report(run: Annotated[PathOrUri, place_argument(help="directory of the run")]) -> None:
    """Write report.html, report.md and their figures from the files of a run: the demo's, your own, or that of auto."""
    from simmerge_ray.reports.run import write_report

    typer.echo(f"report written to {write_report(RunLayout(run)).with_suffix('.html')}, and beside it report.md")
