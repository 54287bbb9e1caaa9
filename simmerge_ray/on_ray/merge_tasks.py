"""One merge split over Ray tasks that write into the same directory on a shared filesystem.

The driver lays out and preallocates the files; every task makes whole tensors at their offsets and keeps a journal of
its own; the driver finishes and renames the directory. The bytes are those of a local merge, for any number of tasks,
and a task that is lost is run again for what its journal lacks. Into a store tasks make whole files, each on a disk of
its own node, and no directory is shared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simmerge_ray.base.storage import RemotePath
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.merging.engine.compute import TensorReport
from simmerge_ray.merging.engine.forms import memory_per_thread
from simmerge_ray.merging.graph import MergeGraph
from simmerge_ray.merging.write.layout import Placement, Shard
from simmerge_ray.merging.write.tensors import JOURNAL, Progress, read_journals, write_tensors
from simmerge_ray.merging.write.to_store import make_file
from simmerge_ray.on_ray.resources import check_room, ray_session
from simmerge_ray.on_ray.tasks import Arguments, OnWait, run_tasks

_LIBRARY_BYTES = 500_000_000  # Python, numpy, torch and numba in a task's process
SHARES_PER_WORKER = 4  # a worker that is slow, or lost with its node, holds up a share of that much work, not its part


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


@dataclass(frozen=True)
class RayRunner:
    """Runs `write_graph` by `num_workers` tasks of `num_threads` CPUs each at a time, spread over the nodes; errors of
    tasks are raised with their type and message."""

    num_workers: int
    num_threads: int = 1

    def __call__(
        self, graph: MergeGraph, partial: Path, placements: Sequence[Placement], progress: Progress | None, total: int
    ) -> None:
        sizes = {output.name: output.num_bytes for output in graph.outputs}
        shares = enumerate(split_by_bytes(placements, SHARES_PER_WORKER * self.num_workers))
        calls = [(partial, share, f"{JOURNAL}.{number}", self.num_threads) for number, share in shares]

        def tell() -> None:
            if progress:
                progress(sum(sizes[name] for name in read_journals(partial)), total)

        for _ in self._results(make_share, graph, calls, tell):
            tell()

    def make_files(
        self, graph: MergeGraph, shards: Sequence[Shard], out: RemotePath, progress: Progress | None, total: int
    ) -> dict[str, TensorReport]:
        """A task a file, the largest first; nothing of them passes through the driver."""
        sizes = {p.output.name: p.output.num_bytes for shard in shards for p in shard.placements}
        done = total - sum(sizes.values())
        ordered = sorted(shards, key=lambda shard: -shard.num_bytes)
        reports: dict[str, TensorReport] = {}
        for made in self._results(make_file, graph, [(shard, out, self.num_threads) for shard in ordered]):
            reports |= made or {}
            if progress:
                progress(done + sum(sizes[name] for name in reports), total)
        return reports

    def _results(
        self, function: Callable[..., Any], graph: MergeGraph, calls: Sequence[Arguments], on_wait: OnWait = None
    ) -> Iterator[Any]:
        """Results of the calls as they end; lost tasks are run again."""
        with ray_session():
            specs = {key: read_headers(ref) for key, ref in graph.checkpoints.items()}
            memory = self.num_threads * memory_per_thread(graph, specs) + _LIBRARY_BYTES
            check_room({"CPU": self.num_threads, "memory": memory}, "a task of the merge")
            options: dict[str, Any] = {"num_cpus": self.num_threads, "memory": memory, "scheduling_strategy": "SPREAD"}
            tasks = run_tasks(
                function, deque(calls), shared=(graph,), max_running=self.num_workers, on_wait=on_wait, **options
            )
            with closing(tasks):  # before the session ends
                yield from (result for _, result in tasks)
