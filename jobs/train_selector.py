"""A selector from signals and labels, as `simmerge train` makes it.

    python jobs/train_selector.py /shared/dataset --out /shared/selector
    python jobs/train_selector.py --signals /shared/run/signals/pairs.parquet --labels /shared/run/labels --out /shared/selector
    ray job submit --working-dir . --entrypoint-num-cpus 1 -- python jobs/train_selector.py /shared/dataset --out /shared/selector

It takes minutes on one core and needs no actors: `--entrypoint-num-cpus 1` keeps it off a head node that has no CPUs to
give. A data set that is there is trained on with a report; what is current is not trained again. Every path may be a URI
(`s3://`, `gs://`). The last line is JSON that says what happened (`simmerge_ray.pipelines.jobs`).
"""  # noqa: E501

from __future__ import annotations

import argparse
import sys
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", help="directory with signals/ and labels/, or labels.parquet")
    parser.add_argument("--signals", help="signal table (Parquet), instead of DATASET")
    parser.add_argument("--labels", help="directory of the label store, instead of DATASET")
    parser.add_argument("--out", required=True, help="directory of the selector")
    parser.add_argument("--arm", action="append", help="an arm to choose from, repeatable; default: all on every pair")
    parser.add_argument("--model", default="mlp", help="mlp, ridge, knn or forest (default: mlp)")
    parser.add_argument("--task-encoding", default="none", help="none, onehot or probe_stats (default: none)")
    parser.add_argument("--crossval", help="JSON of results on unseen checkpoints, without DATASET")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pair = (arguments.signals, arguments.labels)
    if (arguments.dataset is None) == (None in pair) or (arguments.dataset and any((*pair, arguments.crossval))):
        parser.error("give DATASET alone, or both --signals and --labels")

    from simmerge_ray.pipelines.jobs import output_place, run_job

    def work() -> dict[str, Any]:
        from rich.console import Console

        from simmerge_ray.base.config import TrainConfig, check_config
        from simmerge_ray.base.progress import Narrator
        from simmerge_ray.base.storage import as_place

        out = as_place(output_place(arguments.out))
        crossval = as_place(output_place(arguments.crossval, "--crossval")) if arguments.crossval else None

        values = {name: getattr(arguments, name) for name in ("model", "task_encoding", "seed")}
        config, narrator = check_config(TrainConfig, values, "options"), Narrator(Console())
        from simmerge_ray.pipelines.stages import train_dataset_stage, train_stage

        if arguments.dataset is not None:
            train_dataset_stage(as_place(arguments.dataset), out, config, narrator, arguments.arm)
        else:
            signals, labels = as_place(arguments.signals), as_place(arguments.labels)
            train_stage(signals, labels, out, config, narrator, arguments.arm, crossval)
        return {"out": str(out)}

    return run_job("train_selector", work)


if __name__ == "__main__":
    sys.exit(main())
