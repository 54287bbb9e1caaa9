"""A merge, split over Ray tasks: a Hugging Face checkpoint directory with the bytes of `simmerge merge`.

    python jobs/merge_plan.py best.plan.json /shared/merged --workers 4
    ray job submit --working-dir . -- python jobs/merge_plan.py /shared/best.plan.json /shared/merged --workers 4

PLAN is mergekit YAML or a plan file of `simmerge plan` or `simmerge search`. OUT and the checkpoints lie where every
node sees them: on a shared filesystem, or in a store (`s3://`, `gs://`). An interrupted merge goes on where it stopped.
The last line is JSON that says what happened (`simmerge_ray.pipelines.jobs`).
"""

from __future__ import annotations

import argparse
import sys
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", metavar="PLAN", help="plan file (JSON) or mergekit YAML")
    parser.add_argument("out", metavar="OUT", help="checkpoint directory to write")
    parser.add_argument("--workers", type=int, default=2, help="Ray tasks (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="of each task, a CPU each (default: 1)")
    parser.add_argument("--shard-size", type=float, default=5.0, help="largest weight file, in GB (default: 5)")
    parser.add_argument("--strict", action="store_true", help="refuse a merge that holds NaN or infinity")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and every problem")
    arguments = parser.parse_args()
    for name, value in (("--workers", arguments.workers), ("--threads", arguments.threads)):
        if value < 1:
            parser.error(f"{name} must be at least 1, got {value}")
    if arguments.shard_size < 0.001:
        parser.error(f"--shard-size must be at least 0.001 GB, got {arguments.shard_size}")

    from simmerge_ray.pipelines.jobs import output_place, run_job

    def work() -> dict[str, Any]:
        from rich.console import Console

        from simmerge_ray.base.progress import Narrator
        from simmerge_ray.base.storage import as_place
        from simmerge_ray.merging.request import read_request

        out, max_bytes = as_place(output_place(arguments.out, "OUT")), int(arguments.shard_size * 1e9)
        request, narrator = read_request(as_place(arguments.plan), out), Narrator(Console())
        if arguments.dry_run:
            print(*request.lines(max_bytes, arguments.threads), sep="\n")
            return {"status": "unchanged", "out": str(out)}
        from simmerge_ray.on_ray.merge_tasks import ray_runner

        runner = ray_runner(arguments.workers, arguments.threads)
        with narrator.stage("merge") as stage, narrator.byte_bar("bytes written") as report:
            result = request.write(report, max_bytes, arguments.threads, arguments.strict, runner)
            stage.result = f"{request.graph.title} ({result.num_bytes / 1e9:.3g} GB) -> {result.path}"
        print(*result.lines(), sep="\n")
        counts = {"num_tensors": result.num_tensors, "num_resumed": result.num_resumed, "num_bytes": result.num_bytes}
        return {"out": str(result.path), **counts}

    return run_job("merge_plan", work)


if __name__ == "__main__":
    sys.exit(main())
