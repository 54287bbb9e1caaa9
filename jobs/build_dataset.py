"""Signals of all pairs and labels of all merges of a catalogue, from one YAML file.

    python jobs/build_dataset.py study.yaml
    ray job submit --working-dir . -- python jobs/build_dataset.py /shared/study.yaml

The second form runs on the cluster. Paths in the YAML are relative to it; under `ray job submit` use absolute ones, or
URIs (`s3://`, `gs://`; docs/storage.md): the working directory is temporary. What is there is not computed again, so an
interrupted job is run again as it is. With `--dry-run` everything is checked, and what the job would take is printed.
The last line is JSON that reports what happened (`simmerge_ray.pipelines.jobs`).
"""

from __future__ import annotations

from typing import Annotated, Any

from simmerge_ray.cli.app import run_as_job
from simmerge_ray.cli.job_line import with_job_line
from simmerge_ray.cli.places import PathOrUri, place_argument
from simmerge_ray.cli.search import DryRunOption


@with_job_line("build_dataset")
def build_dataset(
    study: Annotated[
        PathOrUri, place_argument(help="YAML file or its URI: catalogue, probes, tasks, out, signals, search")
    ],
    dry_run: DryRunOption = False,
) -> dict[str, Any]:
    from simmerge_ray.base.progress import narrated
    from simmerge_ray.pipelines.stages import build_dataset_stages, load_dataset_config

    config, estimate = load_dataset_config(study)
    with narrated(None) as narrator:
        if dry_run:
            narrator.print_lines(estimate.lines())
            return {"status": "unchanged", "num_trials": estimate.trials}
        build_dataset_stages(config, narrator)
        narrator.print_lines([f"dataset written to {config.out}: signals/pairs.parquet and labels/"])
    return {"out": str(config.out)}


if __name__ == "__main__":
    run_as_job(build_dataset, __doc__)
