"""One merge split over Ray tasks that write into the same directory on a shared filesystem.

The driver lays out and preallocates the files; every task makes whole tensors at their offsets and keeps a journal of
its own; the driver finishes and renames the directory. The bytes are those of a local merge, for any number of tasks,
and a task that is lost is run again for what its journal lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simmerge_ray.distributed.resources import ray_session
from simmerge_ray.merge_graph import MergeGraph
from simmerge_ray.merging.layout import Placement
from simmerge_ray.merging.write import JOURNAL, Progress, Runner, read_journals, write_tensors

_POLL_SECONDS = 0.5


def split_by_bytes(placements: Sequence[Placement], num_shares: int) -> list[list[Placement]]:
    """Shares of about equal size: the largest tensor first, each to the share that has least. No share is empty."""
    shares: list[list[Placement]] = [[] for _ in range(min(num_shares, len(placements)))]
    sizes = [0] * len(shares)
    for placement in sorted(placements, key=lambda p: (-p.output.num_bytes, p.output.name)):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(placement)
        sizes[smallest] += placement.output.num_bytes
    return shares


def make_share(graph: MergeGraph, partial: Path, share: Sequence[Placement], journal: str, num_threads: int) -> None:
    """What one task does: the tensors of its share that no journal has yet."""
    done = read_journals(partial)
    if missing := [placement for placement in share if placement.output.name not in done]:
        write_tensors(graph, partial, missing, journal, num_threads=num_threads)


def ray_runner(num_workers: int, num_threads: int = 1) -> Runner:
    """A runner for `write_graph` with `num_workers` tasks of `num_threads` CPUs each.

    Raises (when run):
        as `write_graph`, with the type and message of the task's error.
    """

    def run(
        graph: MergeGraph, partial: Path, placements: Sequence[Placement], progress: Progress | None, total: int
    ) -> None:
        with ray_session():
            import ray

            sizes = {output.name: output.num_bytes for output in graph.outputs}
            remote = ray.remote(make_share).options(num_cpus=num_threads, max_retries=3)
            shared = ray.put(graph)
            pending = [
                remote.remote(shared, partial, share, f"{JOURNAL}.{number}", num_threads)
                for number, share in enumerate(split_by_bytes(placements, num_workers))
            ]
            try:
                while pending:
                    finished, pending = ray.wait(pending, num_returns=1, timeout=_POLL_SECONDS)
                    if progress:
                        progress(sum(sizes[name] for name in read_journals(partial)), total)
                    for task in finished:
                        ray.get(task)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, Exception) else error) from None
            finally:
                for task in pending:
                    ray.cancel(task, force=True)

    return run
