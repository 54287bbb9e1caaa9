"""A new selector from the rewards of a service: train, compare with the present one, promote, or roll back.

    python jobs/retrain.py --database URL --registry DIR --dataset runs/study --out runs/retrain [--promote | --dry-run]
    python jobs/retrain.py --database URL --registry DIR --roll-back VERSION

The dataset is what the present selector was trained on (as for `simmerge train`). Without `--promote` nothing changes
but `--out`, which gets the selector, all rewards as labels, the comparison and a report. With it the new selector goes
into the registry and begins an epoch in the log, if it is not worse by more than the margin; every replica then folds
the log with it. The same log and labels give the same version: what is there is not trained again, and what is promoted
is not promoted twice. `--roll-back` lets a former selector answer again.

The last line but one says what happened, the last one is JSON that does (`simmerge_ray.pipelines.jobs`). Exit code 0:
done, or nothing to do; 3: `--promote` was asked for and refused, since the new selector may be worse; 2: bad input; 1:
the database failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", required=True, help="URL of the event log")
    parser.add_argument("--namespace", default="default", help="of the log (default: default)")
    parser.add_argument("--registry", type=Path, required=True, help="directory of published selectors")
    parser.add_argument("--dataset", type=Path, help="labels and signals that the present selector was trained on")
    parser.add_argument("--out", type=Path, help="directory for what is trained")
    parser.add_argument("--margin", type=float, default=0.03, help="what counts as not worse (default: 0.03)")
    parser.add_argument("--held-out", type=float, default=0.25, help="share of the rewards to compare on (0.25)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--promote", action="store_true", help="let the new selector answer, if it is not worse")
    action.add_argument("--dry-run", action="store_true", help="say what there is to train on, and stop")
    action.add_argument("--roll-back", metavar="VERSION", help="let a former selector answer again")
    given = vars(parser.parse_args())
    promote, dry_run, version = (given.pop(name) for name in ("promote", "dry_run", "roll_back"))
    if version is None and (given["dataset"] is None or given["out"] is None):
        parser.error("--dataset and --out are needed (only --roll-back does without)")

    from simmerge_ray.pipelines.jobs import local_output, run_job

    def work() -> dict[str, Any]:
        from simmerge_ray.base.config import RetrainConfig, check_config
        from simmerge_ray.pipelines.retrain import run_retraining, run_roll_back

        registry = local_output(given["registry"], "--registry")
        if version is not None:
            result = run_roll_back(given["database"], given["namespace"], registry, version)
        else:
            paths = {"registry": registry, "out": local_output(given["out"])}
            result = run_retraining(check_config(RetrainConfig, given | paths, "options"), promote, dry_run)
        print(result.line)
        return {"status": "refused", "exit_code": 3} if promote and result.refused else {}

    return run_job("retrain", work)


if __name__ == "__main__":
    sys.exit(main())
