"""What the bandit would have reached on labels that are there, beside policies that do not learn: regret and its figure.

    python jobs/replay_bandit.py /shared/dataset --out /shared/replay
    ray job submit --working-dir . --entrypoint-num-cpus 1 -- python jobs/replay_bandit.py /shared/dataset --out /shared/replay

`simmerge_ray.research.bandit.regret` as a job: minutes on one core, no actors. A domain that was played is not played
again. OUT gets `bandit-replay.json` and `.png`. The last line is JSON that says what happened (`simmerge_ray.pipelines.jobs`).
"""  # noqa: E501

from __future__ import annotations

import argparse
import sys
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a finished demo, or a data set as `simmerge train` takes it")
    parser.add_argument("--out", required=True, help="directory for results")
    parser.add_argument("--arm", action="append", help="an arm to choose from, repeatable; default: all on every pair")
    parser.add_argument("--orders", type=int, default=40, help="random orders of the merges (default: 40)")
    parser.add_argument("--rounds", type=int, default=60, help="rounds of each order (default: 60)")
    arguments = parser.parse_args()
    for name, value in (("--orders", arguments.orders), ("--rounds", arguments.rounds)):
        if value < 1:
            parser.error(f"{name} must be at least 1, got {value}")

    from simmerge_ray.pipelines.jobs import local_output, run_job

    def work() -> dict[str, Any]:
        out = local_output(arguments.out)
        from simmerge_ray.base.storage import as_place
        from simmerge_ray.research.bandit.regret import markdown, replay_dataset

        rows = replay_dataset(
            as_place(arguments.dataset), out, "bandit-replay", arguments.arm, arguments.orders, arguments.rounds
        )
        print(*markdown(rows), sep="\n")
        return {"out": str(out), "regret": {row["policy"]: row["utility"] for row in rows}}

    return run_job("replay_bandit", work)


if __name__ == "__main__":
    sys.exit(main())
