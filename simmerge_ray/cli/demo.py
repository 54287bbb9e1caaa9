"""`simmerge demo`, `zoo` and `report`: the whole chain on small checkpoints, these alone, and the report of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simmerge_ray.base.runs import RunLayout
from simmerge_ray.base.storage import Output, check_outputs
from simmerge_ray.cli.places import PathOrUri, place_argument


def demo(
    run: Annotated[Path | None, typer.Argument(help="directory of the run; default: runs/demo, or runs/quick")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="three experts, a merge and what it keeps: a minute, without vLLM")
    ] = False,
) -> None:
    """Run the whole chain on a small zoo: train, signals, search, selector, choices, merge, report.

    The full demo takes about ten minutes on two cores; a second run computes nothing.
    """
    from simmerge_ray.base.progress import narrated

    root = run or Path("runs/quick" if quick else "runs/demo")
    check_outputs([Output(root, "RUN")])
    layout = RunLayout(root)
    if quick:
        _demo_quickly(layout)
        return
    with narrated(layout.log) as narrator:
        from simmerge_ray.pipelines.demo import closing_lines, run_demo

        run_demo(layout, narrator)
        narrator.print_lines(closing_lines(layout))


def _demo_quickly(layout: RunLayout[Path]) -> None:
    import time

    from simmerge_ray.base.progress import narrated
    from simmerge_ray.cli.auto import answer_run
    from simmerge_ray.pipelines.quick_demo import quick_lines, quick_run, quick_zoo

    started = time.monotonic()
    with narrated(layout.log) as narrator:
        quick_zoo(layout, narrator)
        answer_run(quick_run(layout), narrator, started)
    for line in quick_lines(layout):
        typer.echo(line)


def zoo(run: Annotated[Path, typer.Argument(help="directory of the run; the zoo goes to RUN/zoo")]) -> None:
    """Train the demo's fine-tuned checkpoints, with probes and tasks."""
    from simmerge_ray.base.progress import narrated

    check_outputs([Output(run, "RUN")])
    layout = RunLayout(run)
    with narrated(layout.log) as narrator:
        from simmerge_ray.pipelines.demo import zoo_stage

        zoo_stage(layout, narrator)


def report(run: Annotated[PathOrUri, place_argument(help="directory of the run")]) -> None:
    """Write report.html, report.md and their figures from the files of a run: the demo's, your own, or that of auto."""
    from simmerge_ray.reports.run import write_report

    typer.echo(f"report written to {write_report(RunLayout(run)).with_suffix('.html')}, and beside it report.md")
