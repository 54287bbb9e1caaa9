"""Signals of all pairs and labels of all merges of a catalogue, from one YAML file.

    python jobs/build_dataset.py study.yaml
    ray job submit --working-dir . -- python jobs/build_dataset.py /shared/study.yaml

The second form runs on the cluster. Paths in the YAML are relative to it; under `ray job submit` use absolute ones: the
working directory is temporary. What is there is not computed again, so an interrupted job is run again as it is.
With `--dry-run` everything is checked, and what the job would take is printed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML file: catalogue, probes, tasks, out, signals, search")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what it takes, and stop")
    arguments = parser.parse_args()

    from rich.console import Console

    from simmerge_ray.errors import InputError, SimmergeError
    from simmerge_ray.progress import Narrator

    try:
        from simmerge_ray.distributed.stages import build_dataset_stages, load_study

        config, _, estimate = load_study(arguments.study)
        for line in estimate.lines() if arguments.dry_run else ():
            print(line)
        if arguments.dry_run:
            return 0
        out = build_dataset_stages(config, Narrator(Console()))
    except SimmergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(f"dataset written to {out}: signals/pairs.parquet and labels/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
