"""A merge, split over Ray tasks: a Hugging Face checkpoint directory with the bytes of `simmerge merge`.

    python jobs/merge_plan.py best.plan.json /shared/merged --workers 4
    ray job submit --working-dir . -- python jobs/merge_plan.py /shared/best.plan.json /shared/merged --workers 4

PLAN is mergekit YAML or a plan file of `simmerge plan` or `simmerge search`. OUT and the checkpoints lie where every
node sees them: on a shared filesystem, or in a store (`s3://`, `gs://`). An interrupted merge goes on where it stopped.
The default is two workers of one thread each. The last line is JSON that reports what happened
(`simmerge_ray.pipelines.jobs`).
"""

from __future__ import annotations

from simmerge_ray.cli.app import run_as_job
from simmerge_ray.cli.merge import merge

if __name__ == "__main__":
    run_as_job(merge, __doc__, "--workers", "2", "--threads", "1")
