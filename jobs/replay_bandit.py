"""What the bandit would have reached on existing labels, beside policies that do not learn: regret and its figure.

    python jobs/replay_bandit.py /shared/dataset --out /shared/replay
    ray job submit --working-dir . --entrypoint-num-cpus 1 -- python jobs/replay_bandit.py /shared/dataset --out /shared/replay

`simmerge_ray.research.bandit.regret` as a job: minutes on one core, no actors. A domain that was played is not played
again. OUT gets `NAME.json` and `.png`. The last line is JSON that reports what happened (`simmerge_ray.pipelines.jobs`).
"""  # noqa: E501

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from simmerge_ray.cli.app import run_as_job
from simmerge_ray.cli.job_line import with_job_line
from simmerge_ray.cli.places import PathOrUri, path_option, place_argument


@with_job_line("replay_bandit", "out")
def replay_bandit(
    dataset: Annotated[PathOrUri, place_argument(help="a finished demo, or a data set as `simmerge train` takes it")],
    out: Annotated[Path, path_option(help="directory for results")],
    arm: Annotated[
        list[str] | None, typer.Option(help="an arm to choose from; repeatable; default: all on every pair")
    ] = None,
    orders: Annotated[int, typer.Option(min=1, help="random orders of the merges")] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="rounds of each order")] = 60,
    name: Annotated[str, typer.Option(help="of the files in OUT")] = "bandit-replay",
) -> dict[str, Any]:
    from simmerge_ray.research.bandit.regret import markdown, replay_dataset

    rows = replay_dataset(dataset, out, name, arm, orders, rounds)
    print(*markdown(rows), sep="\n")
    return {"out": str(out), "regret": {row["policy"]: row["utility"] for row in rows}}


if __name__ == "__main__":
    run_as_job(replay_bandit, __doc__)
