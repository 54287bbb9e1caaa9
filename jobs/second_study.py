"""The second study (docs/study-2-plan.md): experts on real tasks, choices and labels of their merges, small bases with
experts. Takes hours.

    python jobs/second_study.py --out runs/second --tasks DIRECTORY --base CHECKPOINT --only real-zoo --only real-labels
    python jobs/second_study.py --out runs/second --only small-zoos --only small-choices --only small-labels

What is there is not made again, so an interrupted run goes on with the same command; `--share 1/2` and `--share 2/2` in
two processes share the experts and pairs. `python -m
benchmarks.finding.real_tasks` makes the directory of tasks, `python -m benchmarks.merge.fixtures` the checkpoint
(`134m/base`). OUT is a directory that every node sees. The last line is JSON that reports what happened
(`simmerge_ray.pipelines.jobs`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from simmerge_ray.cli.app import run_as_job
from simmerge_ray.cli.job_line import with_job_line
from simmerge_ray.cli.places import path_option


@with_job_line("second_study", "out")
def second_study(
    out: Annotated[Path, path_option(help="directory of the study")],
    tasks: Annotated[Path | None, path_option(help="directory of the real tasks")] = None,
    base: Annotated[Path | None, path_option(help="the pretrained checkpoint")] = None,
    published: Annotated[
        Path | None, path_option(help="docs/study/second: its labels and choices of the same checkpoints are kept")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="real-pilot, real-zoo, real-held-out, real-choices, real-labels, real-results, real-four, real-sets, "
            "real-sets-results, small-zoos, small-choices, small-labels or small-results"
        ),
    ] = None,
    share: Annotated[
        str, typer.Option(help="I/N: every N-th expert, pair and small base from the I-th on, for N processes at once")
    ] = "1/1",
    num_pairs: Annotated[
        int | None, typer.Option(min=1, help="of each base, the first of a random order (real: all, small: 24)")
    ] = None,
    num_members: Annotated[
        int, typer.Option(min=2, max=4, help="of each set of real-sets, whose number is --num-pairs")
    ] = 4,
    num_bases: Annotated[int | None, typer.Option(min=1, max=12, help="the first small bases alone (12)")] = None,
) -> dict[str, Any]:
    from simmerge_ray.base.errors import ConfigError, unknown_name
    from simmerge_ray.base.progress import narrated
    from simmerge_ray.pipelines.second_study.run import StudyRun
    from simmerge_ray.pipelines.second_study.study import STAGES, run_stages

    for name in only or ():
        if name not in STAGES:
            raise ConfigError(unknown_name("stage", name, STAGES))
    if not (found := re.fullmatch(r"(\d+)/(\d+)", share)) or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"--share must be I/N with 1 <= I <= N, not {share!r}")
    mine = (int(found[1]) - 1, int(found[2]))
    with narrated(out / "simmerge.log") as narrator:
        counts = num_pairs, num_bases, num_members
        run_stages(StudyRun(out, tasks, base, narrator, mine, *counts, published), only or STAGES)
    print(f"zoos in {out}")
    return {"out": str(out), "stages": only or list(STAGES)}


if __name__ == "__main__":
    run_as_job(second_study, __doc__)
