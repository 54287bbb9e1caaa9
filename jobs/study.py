"""The study that says whether selection works: trains a zoo of its own and labels merges of it. Takes hours.

    python jobs/study.py --out runs/study
    ray job submit --working-dir . -- python jobs/study.py --out /shared/study

What is there is not computed again, so an interrupted study goes on with the same command. `--config` names a YAML file
with other sizes (see `simmerge_ray.config.ZooStudyConfig`), `--stage` runs some stages only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the study")
    parser.add_argument("--config", type=Path, help="YAML file with sizes that differ from the study's")
    parser.add_argument(
        "--stage", action="append", help="zoo, signals, pairs, plans, probes, exact or analysis; repeatable"
    )
    arguments = parser.parse_args()

    from simmerge_ray.errors import ConfigError, InputError, SimmergeError, unknown_name
    from simmerge_ray.progress import narrated

    try:
        from simmerge_ray.config import ZooStudyConfig, load_yaml
        from simmerge_ray.distributed.study import STAGES, run_study

        for stage in arguments.stage or ():
            if stage not in STAGES:
                raise ConfigError(unknown_name("stage", stage, STAGES))
        config = load_yaml(arguments.config, ZooStudyConfig) if arguments.config else ZooStudyConfig()
        with narrated(arguments.out / "simmerge.log") as narrator:
            run_study(arguments.out, config, narrator, arguments.stage or STAGES)
    except SimmergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(f"study in {arguments.out}: zoo/, signals/, labels/ and results/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
