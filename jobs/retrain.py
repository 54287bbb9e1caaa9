"""A new selector from the rewards of a service: train, compare with the present one, promote, or roll back.

    python jobs/retrain.py --database URL --registry DIR --dataset runs/study --out runs/retrain [--promote | --dry-run]
    python jobs/retrain.py --database URL --registry DIR --roll-back VERSION

The dataset is what the present selector was trained on (as for `simmerge train`). Without `--promote` nothing changes
but `--out`, which gets the selector, all rewards as labels, the comparison and a report. With it the new selector goes
into the registry and begins an epoch in the log, if it is not worse by more than the margin; every replica then folds
the log with it. The same log and labels give the same version: what is there is not trained again, and what is promoted
is not promoted twice. `--roll-back` lets a former selector answer again.

The last line but one says what happened, the last one the same as JSON (`simmerge_ray.pipelines.jobs`). Exit code 0:
done, or nothing to do; 3: `--promote` was asked for and refused, since the new selector may be worse; 2: bad input; 1:
the database failed.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from simmerge_ray.base.config import RetrainConfig
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.cli.app import run_as_job
from simmerge_ray.cli.job_line import with_job_line
from simmerge_ray.cli.options import with_config_options


@with_job_line("retrain", "registry", "out")
@with_config_options
def retrain(
    config: RetrainConfig,
    promote: Annotated[bool, typer.Option("--promote", help="let the new selector answer, if it is not worse")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what there is to train on, and stop")] = False,
    roll_back: Annotated[str | None, typer.Option(metavar="VERSION", help="let a former selector answer again")] = None,
) -> dict[str, Any]:
    if promote + dry_run + (roll_back is not None) > 1:
        raise ConfigError("give one of --promote, --dry-run and --roll-back")
    from simmerge_ray.pipelines.retrain import run_retraining, run_roll_back

    result = run_retraining(config, promote, dry_run) if roll_back is None else run_roll_back(config, roll_back)
    print(result.line)
    return {"status": "refused", "exit_code": 3} if promote and result.refused else {}


if __name__ == "__main__":
    run_as_job(retrain, __doc__)
