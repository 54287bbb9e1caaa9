"""Signals of all pairs and labels of all merges of a catalogue, from one YAML file.

    python jobs/build_dataset.py study.yaml
    ray job submit --working-dir . -- python jobs/build_dataset.py /shared/study.yaml

The second form runs on the cluster. Paths in the YAML are relative to it; under `ray job submit` use absolute ones, or
URIs (`s3://`, `gs://`; docs/storage.md): the working directory is temporary. What is there is not computed again, so an
interrupted job is run again as it is. With `--dry-run` everything is checked, and what the job would take is printed.
The last line is JSON that says what happened (`simmerge_ray.pipelines.jobs`).
"""

from __future__ import annotations

import argparse
import sys
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="YAML file or its URI: catalogue, probes, tasks, out, signals, search")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what it takes, and stop")
    arguments = parser.parse_args()

    from simmerge_ray.pipelines.jobs import output_place, run_job

    def work() -> dict[str, Any]:
        from rich.console import Console

        from simmerge_ray.base.config import DatasetConfig, load_yaml_leniently
        from simmerge_ray.base.progress import Narrator
        from simmerge_ray.base.storage import as_place

        study = as_place(arguments.study)
        given, _ = load_yaml_leniently(study, DatasetConfig)
        if given is not None:
            output_place(given.out, f"`out` in {study}")
        from simmerge_ray.pipelines.stages import build_dataset_stages, load_dataset_config

        config, _, estimate = load_dataset_config(study)
        if arguments.dry_run:
            print(*estimate.lines(), sep="\n")
            return {"status": "unchanged", "num_trials": estimate.trials}
        out = build_dataset_stages(config, Narrator(Console()))
        print(f"dataset written to {out}: signals/pairs.parquet and labels/")
        return {"out": str(out)}

    return run_job("build_dataset", work)


if __name__ == "__main__":
    sys.exit(main())
