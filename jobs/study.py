"""The study that shows whether selection works: trains a zoo of its own and labels merges of it. Takes hours.

    python jobs/study.py --out runs/study
    ray job submit --working-dir . -- python jobs/study.py --out /shared/study

What is there is not computed again, so an interrupted study goes on with the same command. `--config` names a YAML
file with other sizes (see `simmerge_ray.base.config.StudyConfig`), `--stage` runs some stages only. OUT is a
directory that every node sees: trained checkpoints lie in it. The last line is JSON that reports what happened
(`simmerge_ray.pipelines.jobs`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from simmerge_ray.base.config import StudyConfig, load_yaml
from simmerge_ray.cli.app import run_as_job
from simmerge_ray.cli.job_line import with_job_line
from simmerge_ray.cli.places import path_option


@with_job_line("study", "out")
def study(
    out: Annotated[Path, path_option(help="directory of the study")],
    config: Annotated[Path | None, typer.Option(help="YAML file with sizes that differ from the study's")] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="zoo, signals, pairs, plans, probes, exact or analysis; repeatable")
    ] = None,
) -> dict[str, Any]:
    sizes = load_yaml(config, StudyConfig) if config else StudyConfig()
    from simmerge_ray.base.errors import ConfigError, unknown_name
    from simmerge_ray.base.progress import narrated
    from simmerge_ray.pipelines.study import STAGES, run_study

    for name in stage or ():
        if name not in STAGES:
            raise ConfigError(unknown_name("stage", name, STAGES))
    with narrated(out / "simmerge.log") as narrator:
        run_study(out, sizes, narrator, stage or STAGES)
    print(f"study in {out}: zoo/, signals/, labels/ and results/")
    return {"out": str(out), "stages": stage or list(STAGES)}


if __name__ == "__main__":
    run_as_job(study, __doc__)
