"""The study that says whether selection works: trains a zoo of its own and labels merges of it. Takes hours.

    python jobs/study.py --out runs/study
    ray job submit --working-dir . -- python jobs/study.py --out /shared/study

What is there is not computed again, so an interrupted study goes on with the same command. `--config` names a YAML
file with other sizes (see `simmerge_ray.base.config.StudyConfig`), `--stage` runs some stages only. OUT is a
directory that every node sees: trained checkpoints lie in it. The last line is JSON that says what happened
(`simmerge_ray.pipelines.jobs`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="directory of the study")
    parser.add_argument("--config", type=Path, help="YAML file with sizes that differ from the study's")
    parser.add_argument(
        "--stage", action="append", help="zoo, signals, pairs, plans, probes, exact or analysis; repeatable"
    )
    arguments = parser.parse_args()

    from simmerge_ray.pipelines.jobs import local_output, run_job

    def work() -> dict[str, Any]:
        out = local_output(arguments.out)
        from simmerge_ray.base.config import StudyConfig, load_yaml
        from simmerge_ray.base.errors import ConfigError, unknown_name
        from simmerge_ray.base.progress import narrated

        config = load_yaml(arguments.config, StudyConfig) if arguments.config else StudyConfig()
        from simmerge_ray.pipelines.study import STAGES, run_study

        for stage in arguments.stage or ():
            if stage not in STAGES:
                raise ConfigError(unknown_name("stage", stage, STAGES))
        with narrated(out / "simmerge.log") as narrator:
            run_study(out, config, narrator, arguments.stage or STAGES)
        print(f"study in {out}: zoo/, signals/, labels/ and results/")
        return {"out": str(out), "stages": arguments.stage or list(STAGES)}

    return run_job("study", work)


if __name__ == "__main__":
    sys.exit(main())
