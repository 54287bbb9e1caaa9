"""Tensors of a merge computed by threads and written at their offsets; a journal notes each one that is finished.

Threads take whole tensors, the largest first, and each reads, computes and writes its own block by block: reading,
arithmetic and writing overlap without queues between them, and memory is a few blocks a thread.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from simmerge_ray.base.errors import OutputError
from simmerge_ray.base.storage import Place, list_places
from simmerge_ray.merging.engine.compute import Computer, TensorReport
from simmerge_ray.merging.engine.seeds import Seeds
from simmerge_ray.merging.engine.sources import open_sources
from simmerge_ray.merging.graph import MergeGraph
from simmerge_ray.merging.write.layout import Placement

JOURNAL = "merge.journal"
MAX_THREADS = 4  # that merge in one process, or in one rank of an engine; then the memory bus is busy
_PROGRESS_BYTES = 1 << 23

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def default_threads() -> int:
    """As many as this process has cores, at most `MAX_THREADS`."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


def read_journals(partial: Place) -> dict[str, TensorReport]:
    """Finished tensors of an unfinished merge. A line cut off by a kill does not count."""
    reports = {}
    for journal in list_places(partial, f"{JOURNAL}*"):
        for line in journal.read_bytes().split(b"\n")[:-1]:
            entry = json.loads(line)
            reports[entry["name"]] = TensorReport(entry["name"], entry["not_finite"], tuple(entry["fell_back"]))
    return reports


def _open_journal(path: Path) -> int:
    """Open for appending, without the piece of a line that a kill left."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    os.ftruncate(descriptor, path.read_bytes().rfind(b"\n") + 1)
    return descriptor


def write_tensors(
    graph: MergeGraph,
    partial: Path,
    placements: Sequence[Placement],
    journal: str,
    progress: Progress | None = None,
    num_threads: int | None = None,
    total_bytes: int | None = None,
) -> None:
    """Compute tensors and write them at their offsets into preallocated files; note each in the journal when done.

    Several processes, also of several machines, may do this for disjoint placements with journals of their own.
    """
    work = _Work(partial, placements, journal, progress, total_bytes)
    count = min(num_threads or default_threads(), len(placements))
    with open_sources(graph) as sources, closing(work), ThreadPoolExecutor(count, "merge") as pool:
        seeds = Seeds(graph)
        try:
            for end in as_completed([pool.submit(work.run, Computer(graph, sources, seeds)) for _ in range(count)]):
                end.result()
        finally:
            work.is_stopped = True


class _Work:
    """The tensors that are left, taken by threads one by one; where they are written, and how far it has come."""

    def __init__(
        self,
        partial: Path,
        placements: Sequence[Placement],
        journal: str,
        progress: Progress | None,
        total_bytes: int | None,
    ) -> None:
        num_bytes = sum(p.output.num_bytes for p in placements)
        self.is_stopped = False
        self._left = iter(sorted(placements, key=lambda p: (-p.output.num_bytes, p.output.name)))
        self._total = total_bytes or num_bytes
        self._written, self._progress, self._lock = self._total - num_bytes, progress, threading.Lock()
        self._files = {name: os.open(partial / name, os.O_WRONLY) for name in {p.file for p in placements}}
        self._log = _open_journal(partial / journal)

    def close(self) -> None:
        for descriptor in (*self._files.values(), self._log):
            os.close(descriptor)

    def run(self, computer: Computer) -> None:
        """Make tensors until there is none left, or another thread failed, or the merge was interrupted."""
        with suppress(_Stopped):
            for placement in self._left:
                if self.is_stopped:
                    return
                self._write(computer, placement)

    def _write(self, computer: Computer, placement: Placement) -> None:
        descriptor, unreported = self._files[placement.file], 0

        def emit(start: int, block: np.ndarray) -> None:
            nonlocal unreported
            if self.is_stopped:
                raise _Stopped
            _write_at(descriptor, block.view(np.uint8).data, placement.offset + start * block.itemsize)
            unreported += block.nbytes
            if unreported >= _PROGRESS_BYTES:
                self._tell(unreported)
                unreported = 0

        report = computer.compute(placement.output, emit)
        os.write(self._log, json.dumps(asdict(report)).encode() + b"\n")
        self._tell(unreported)

    def _tell(self, num_bytes: int) -> None:
        with self._lock:
            self._written += num_bytes
            if self._progress:
                self._progress(self._written, self._total)


class _Stopped(Exception):
    """Another thread failed, or the merge was interrupted."""


def _write_at(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    try:
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], offset + done)
    except OSError as error:
        raise OutputError(f"cannot write the merged weights: {error.strerror}") from None
