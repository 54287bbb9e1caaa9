"""`simmerge merge`: a merged checkpoint from a plan. `jobs/merge_plan.py` is the same command as a job."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from simmerge_ray.cli.job_line import with_job_line
from simmerge_ray.cli.places import PathOrUri, place_argument


@with_job_line("merge_plan", "out")
def merge(
    plan_file: Annotated[
        PathOrUri,
        place_argument(metavar="PLAN", help="mergekit YAML, or plan JSON as `simmerge plan --out` writes it"),
    ],
    out: Annotated[PathOrUri, place_argument(help="checkpoint directory to write")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, and every problem")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="refuse keys without effect, and NaN or infinity")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="of each worker; default: as many as cores, at most 4")
    ] = None,
    shard_size: Annotated[float, typer.Option(min=0.001, help="largest weight file, in GB")] = 5.0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="split the work over Ray tasks; OUT and inputs on a shared filesystem")
    ] = None,
) -> dict[str, Any]:
    """Make a merge: a Hugging Face checkpoint directory. An interrupted merge goes on where it stopped."""
    from simmerge_ray.base.progress import narrated
    from simmerge_ray.merging.request import read_request
    from simmerge_ray.merging.write.output import WriteOptions

    with narrated(None) as narrator:
        request, max_bytes = read_request(plan_file, out, strict), int(shard_size * 1e9)
        if dry_run:
            narrator.print_lines(request.lines(max_bytes, threads))
            return {"status": "unchanged", "out": str(out)}
        narrator.print_lines(request.warnings())
        runner = None
        if workers is not None:
            from simmerge_ray.on_ray.merge_tasks import RayRunner

            runner = RayRunner(workers, threads or 1)
        with narrator.stage("merge") as stage:
            with narrator.byte_bar("bytes written") as report:
                options = WriteOptions(None, report, max_bytes, threads, strict, runner=runner)
                merged = request.write(options)
            stage.result = f"{request.graph.title} ({merged.num_bytes / 1e9:.3g} GB) -> {merged.path}"
        narrator.print_lines(merged.lines())
    counts = {"num_tensors": merged.num_tensors, "num_resumed": merged.num_resumed, "num_bytes": merged.num_bytes}
    return {"out": str(merged.path), **counts}
