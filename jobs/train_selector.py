"""A selector from signals and labels, as `simmerge train` makes it.

    python jobs/train_selector.py /shared/dataset --out /shared/selector
    python jobs/train_selector.py --signals /shared/run/signals/pairs.parquet --labels /shared/run/labels --out /shared/selector
    ray job submit --working-dir . --entrypoint-num-cpus 1 -- python jobs/train_selector.py /shared/dataset --out /shared/selector

It takes minutes on one core and needs no actors: `--entrypoint-num-cpus 1` keeps it off a head node that has no CPUs to
give. A data set that is there is trained on with a report; what is current is not trained again. Every path may be a URI
(`s3://`, `gs://`). The last line is JSON that reports what happened (`simmerge_ray.pipelines.jobs`).
"""  # noqa: E501

from __future__ import annotations

from simmerge_ray.cli.app import run_as_job
from simmerge_ray.cli.train import train

if __name__ == "__main__":
    run_as_job(train, __doc__)
