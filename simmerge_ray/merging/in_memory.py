"""A merge as an iterator of named tensors in memory: what a live evaluation engine loads."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import numpy as np
from torch import Tensor

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.engine.compute import Computer, TensorReport
from simmerge_ray.merging.engine.forms import memory_per_thread
from simmerge_ray.merging.engine.global_trims import resolve_global_trims
from simmerge_ray.merging.engine.seeds import Seeds
from simmerge_ray.merging.engine.sources import open_sources
from simmerge_ray.merging.engine.whole import flat_tensor
from simmerge_ray.merging.graph import OutputTensor
from simmerge_ray.plans.plan import ResolvedPlan

Result = TypeVar("Result")

_AHEAD_BYTES = 4 << 30  # of tensors that are computed before they are asked for, and of what computing them takes


def merged_tensors(
    resolved: ResolvedPlan, reports: list[TensorReport] | None = None, num_threads: int = 1
) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of the merge, one at a time, in name order: the bytes that `write_merge` would write.

    Args:
        reports: gets one entry a tensor. Inputs are taken as checked (`check_compatible`).
        num_threads: that compute tensors, the next ones while one is used; fewer where whole tensors are held for it.
    """
    graph = resolve_global_trims(compile_plan(resolved, check=False), num_threads=num_threads)
    with open_sources(graph) as sources:
        seeds = Seeds(graph)
        each = memory_per_thread(graph, {key: source.specs for key, source in sources.items()})
        num_threads = max(1, min(num_threads, _AHEAD_BYTES // each))
        idle: queue.SimpleQueue[Computer] = queue.SimpleQueue()  # one for each thread
        for _ in range(num_threads):
            idle.put(Computer(graph, sources, seeds))

        def compute(output: OutputTensor) -> tuple[np.ndarray, TensorReport]:
            computer = idle.get()
            try:
                return computer.array(output)
            finally:
                idle.put(computer)

        with closing(_in_order(compute, graph.outputs, num_threads)) as computed:  # before the sources are
            for output, (array, report) in computed:
                if reports is not None:
                    reports.append(report)
                yield output.name, flat_tensor(array).reshape(output.shape)


def _in_order(
    compute: Callable[[OutputTensor], Result], outputs: Sequence[OutputTensor], num_threads: int
) -> Generator[tuple[OutputTensor, Result], None, None]:
    """Outputs with their results, in order; with several threads the next ones are computed meanwhile."""
    if num_threads <= 1:
        for output in outputs:
            yield output, compute(output)
        return
    waiting: deque[tuple[OutputTensor, Future[Result]]] = deque()
    ahead, held = iter(outputs), 0
    following = next(ahead, None)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="merge") as pool:
        try:
            while following is not None or waiting:
                while following is not None and (
                    not waiting or (len(waiting) <= num_threads and held + following.num_bytes <= _AHEAD_BYTES)
                ):
                    waiting.append((following, pool.submit(compute, following)))
                    held += following.num_bytes
                    following = next(ahead, None)
                output, result = waiting.popleft()
                held -= output.num_bytes
                yield output, result.result()
        finally:
            for _, future in waiting:  # who stops reading waits for the tensors that are being computed, not for all
                future.cancel()


class FiniteStream:
    """`merged_tensors` for an evaluation engine, where a merge that is not finite must not be measured.

    It never stops at such a tensor, since an engine whose loading breaks off is unusable: call `check` at its end.
    """

    def __init__(self, resolved: ResolvedPlan, num_threads: int = 1) -> None:
        self._resolved, self._num_threads = resolved, num_threads
        self._reports: list[TensorReport] = []

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return merged_tensors(self._resolved, self._reports, self._num_threads)

    def check(self) -> None:
        """Refuse what was streamed. Raises CheckpointError: a tensor of the merge holds NaN or infinity."""
        for report in self._reports:
            if report.not_finite:
                label = self._resolved.plan.label
                raise CheckpointError(f"merge {label!r}: tensor {report.name} holds NaN or infinity")
