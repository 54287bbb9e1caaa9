"""The merge that keeps most of what its members answer, from a catalogue and probes: `simmerge auto` as a job.

    python jobs/find_merge.py catalogue.yaml --probes probes --out best --evaluator transformers
    ray job submit --working-dir . -- python jobs/find_merge.py /shared/catalogue.yaml --probes /shared/probes --out /shared/best

OUT is a directory that every node sees: what tuning has reached and the merge lie in it; signatures may go to a store
(`--signatures s3://...`). `--gpus-per-trial` is for answers, candidates and tuning alike. An interrupted job goes on
with the same command; a second submission of it waits for the first and computes nothing twice. The last line is JSON
that reports what happened (`simmerge_ray.pipelines.jobs`): `answer` is `merge` or `keep`.
"""  # noqa: E501

from __future__ import annotations

from simmerge_ray.cli.app import run_as_job
from simmerge_ray.cli.auto import auto

if __name__ == "__main__":
    run_as_job(auto, __doc__)
