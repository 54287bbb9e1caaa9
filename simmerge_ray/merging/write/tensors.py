"""Tensors of a merge computed by threads and written at their offsets; a journal notes each one that is finished.

Threads take whole tensors, the largest first, and each reads, computes and writes its own block by block: reading,
arithmetic and writing overlap without queues between them, and memory is a few blocks a thread.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from simmerge_ray.base.errors import OutputError
from simmerge_ray.base.storage import Place, list_places
from simmerge_ray.merging.engine.compute import Computer, TensorReport
from simmerge_ray.merging.engine.seeds import Seeds
from simmerge_ray.merging.engine.sources import TensorSource
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

    Raises:
        see `directory.write_graph`.
    """
    total = total_bytes or sum(p.output.num_bytes for p in placements)
    events: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
    work: queue.SimpleQueue[Placement] = queue.SimpleQueue()
    for placement in sorted(placements, key=lambda p: (-p.output.num_bytes, p.output.name)):
        work.put(placement)
    stop = threading.Event()
    sources = {key: TensorSource(ref) for key, ref in graph.checkpoints.items()}
    files = {name: os.open(partial / name, os.O_WRONLY) for name in {p.file for p in placements}}
    log = _open_journal(partial / journal)
    worker = _Worker(graph, sources, files, log, work, events, stop)
    count = min(num_threads or default_threads(), len(placements))
    threads = [threading.Thread(target=worker.run, name=f"merge-{number}", daemon=True) for number in range(count)]
    written = total - sum(p.output.num_bytes for p in placements)
    try:
        for thread in threads:
            thread.start()
        ended = 0
        while ended < count:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            if event < 0:
                ended += 1
            else:
                written += event
                if progress:
                    progress(written, total)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        for source in sources.values():
            source.close()
        for descriptor in (*files.values(), log):
            os.close(descriptor)


class _Worker:
    """What every thread does until there is no tensor left. Events: bytes written, -1 at the end, or an error."""

    def __init__(
        self,
        graph: MergeGraph,
        sources: Mapping[str, TensorSource],
        files: Mapping[str, int],
        log: int,
        work: queue.SimpleQueue[Placement],
        events: queue.SimpleQueue[int | BaseException],
        stop: threading.Event,
    ) -> None:
        self._graph, self._sources, self._files, self._log = graph, sources, files, log
        self._work, self._events, self._stop = work, events, stop
        self._seeds = Seeds(graph)

    def run(self) -> None:
        try:
            computer = Computer(self._graph, self._sources, self._seeds)
            while not self._stop.is_set():
                try:
                    placement = self._work.get_nowait()
                except queue.Empty:
                    break
                self._write(computer, placement)
            self._events.put(-1)
        except _Stopped:
            self._events.put(-1)
        except BaseException as error:
            self._events.put(error)

    def _write(self, computer: Computer, placement: Placement) -> None:
        descriptor, unreported = self._files[placement.file], 0

        def emit(start: int, block: np.ndarray) -> None:
            nonlocal unreported
            if self._stop.is_set():
                raise _Stopped
            _write_at(descriptor, block.view(np.uint8).data, placement.offset + start * block.itemsize)
            unreported += block.nbytes
            if unreported >= _PROGRESS_BYTES:
                self._events.put(unreported)
                unreported = 0

        report = computer.compute(placement.output, emit)
        line = {"name": report.name, "not_finite": report.not_finite, "fell_back": list(report.fell_back)}
        os.write(self._log, json.dumps(line).encode() + b"\n")
        self._events.put(unreported)


class _Stopped(Exception):
    """Another thread failed, or the merge was interrupted."""


def _write_at(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    try:
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], offset + done)
    except OSError as error:
        raise OutputError(f"cannot write the merged weights: {error.strerror}") from None
