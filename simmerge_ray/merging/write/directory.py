"""Write a merge as a Hugging Face checkpoint directory: in parallel, resumable, whole or absent.

Threads take whole tensors, the largest first, and each reads, computes and writes its own block by block; so reading,
arithmetic and writing overlap across threads without queues between them, and memory is a few blocks a thread. A
finished tensor is noted in a journal, and an interrupted merge goes on from there.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from simmerge_ray.base.errors import CheckpointError, InputError, OutputError
from simmerge_ray.base.storage import (
    Manifest,
    Place,
    RemotePath,
    digest_json,
    file_names,
    list_places,
    publish_directory,
    write_json,
)
from simmerge_ray.checkpoints.digests import checkpoint_fingerprint
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.engine.compute import Computer, Seeds, TensorReport
from simmerge_ray.merging.engine.global_trims import global_steps, resolve_global_trims
from simmerge_ray.merging.engine.sources import TensorSource
from simmerge_ray.merging.graph import MergeGraph
from simmerge_ray.merging.write.card import model_card
from simmerge_ray.merging.write.layout import MAX_SHARD_BYTES, Layout, Placement, Shard, plan_layout, preallocate
from simmerge_ray.plans.plan import ResolvedPlan, write_plan

PLAN_FILE = "simmerge_plan.json"
MANIFEST_FILE = "simmerge_manifest.json"
STATE_FILE = "merge.state.json"
JOURNAL = "merge.journal"
MAX_THREADS = 4  # that merge in one process, or in one rank of an engine; then the memory bus is busy
_PROGRESS_BYTES = 1 << 23
_COPIED_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip

Progress = Callable[[int, int], None]


class Runner(Protocol):
    """Makes tensors elsewhere than in threads of this process."""

    def __call__(
        self, graph: MergeGraph, partial: Path, placements: Sequence[Placement], progress: Progress | None, total: int
    ) -> None:
        """Make the tensors that are missing in a directory which every worker sees."""

    def make_files(
        self, graph: MergeGraph, files: Sequence[FileOfMerge], out: RemotePath, progress: Progress | None, total: int
    ) -> dict[str, TensorReport]:
        """Make whole files in a store (`to_store.make_file`); reports of their tensors by name."""


@dataclass(frozen=True)
class FileOfMerge:
    """A weight file of the result and the tensors in it."""

    shard: Shard
    placements: tuple[Placement, ...]


@dataclass(frozen=True)
class MergeResult:
    """What was written, and what was noticed.

    num_resumed: tensors that an interrupted merge had finished. not_finite: tensors that hold NaN or infinity.
    fell_back: for every SLERP step (from 1) the tensors on which it was the linear average.
    """

    path: Place
    num_bytes: int
    num_resumed: int
    not_finite: tuple[str, ...]
    fell_back: Mapping[int, tuple[str, ...]]
    num_tensors: int

    def lines(self) -> list[str]:
        """What a person should know of it beside its path."""
        lines = []
        if self.num_resumed:
            lines.append(
                f"went on from an interrupted merge: {self.num_resumed} of {self.num_tensors} tensors were there"
            )
        for step, names in self.fell_back.items():
            lines.append(f"step {step}: slerp was the linear average on {len(names)} of {self.num_tensors} tensors")
        if self.not_finite:
            shown = ", ".join(self.not_finite[:5]) + (" ..." if len(self.not_finite) > 5 else "")
            lines.append(f"warning: NaN or infinity in {len(self.not_finite)} tensors: {shown}")
        return lines


def write_merge(
    resolved: ResolvedPlan,
    out: Place,
    predicted: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    num_threads: int | None = None,
    strict: bool = False,
) -> MergeResult:
    """Write the merge of a plan; see `write_graph`. The plan is written beside the weights, with predicted utilities.

    Raises:
        as `write_graph`; IncompatibleCheckpointsError: the inputs do not fit each other.
    """
    check_target(out)
    graph = compile_plan(resolved)

    def finish(directory: Path) -> None:
        write_plan(directory / PLAN_FILE, resolved, predicted)

    return write_graph(graph, out, predicted, progress, max_shard_bytes, num_threads, strict, finish)


def write_graph(
    graph: MergeGraph,
    out: Place,
    predicted: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    num_threads: int | None = None,
    strict: bool = False,
    finish: Callable[[Path], None] | None = None,
    runner: Runner | None = None,
) -> MergeResult:
    """Write the merge of a graph into the directory `out`, which appears under its name only when complete.

    Until then it is a hidden sibling; in a store, objects without a `config.json` (see `to_store`). After Ctrl-C, a
    kill or a lost worker the next call with the same graph and unchanged inputs goes on where it stopped; after an
    error of the list below nothing is left.

    Args:
        predicted: utilities by task for the model card. progress: called with (bytes done, bytes in all).
        strict: refuse a result with NaN or infinity. finish: adds files to the directory before it is renamed.
        runner: makes the tensors elsewhere (see `distributed.distributed_merge`); default: threads of this process.

    Raises:
        OutputError: the target is something else, cannot be written, or has too little space.
        PlanError: see `global_trims.global_steps`.
        CheckpointError: an input ends early, integer tensors differ, or (strict) the result is not finite.
    """
    check_target(out)
    global_steps(graph)
    if isinstance(out, RemotePath):
        from simmerge_ray.merging.write.to_store import write_to_store

        return write_to_store(graph, out, predicted, progress, max_shard_bytes, num_threads, strict, finish, runner)
    started = time.monotonic()
    layout = plan_layout(graph.outputs, max_shard_bytes)
    inputs = {key: checkpoint_fingerprint(ref) for key, ref in graph.checkpoints.items()}
    with _partial_directory(graph, out, layout, inputs) as partial:
        done = read_journals(partial)
        num_resumed = len(done)
        missing = [p for p in layout.placements if p.output.name not in done]
        if missing:
            trimmed = resolve_global_trims(graph, num_threads or default_threads())
            made = {output.name: output for output in trimmed.outputs}
            missing = [replace(placement, output=made[placement.output.name]) for placement in missing]
            if runner:
                runner(trimmed, partial, missing, progress, graph.num_bytes)
            else:
                write_tensors(trimmed, partial, missing, JOURNAL, progress, num_threads, graph.num_bytes)
        result = result_of(out, layout, read_journals(partial), num_resumed)
        if strict and result.not_finite:
            raise CheckpointError(f"the merge holds NaN or infinity in {', '.join(result.not_finite[:5])}")
        write_beside(graph, partial, layout, result, inputs, predicted, time.monotonic() - started)
        if finish:
            finish(partial)
        _publish(partial, out)
    return result


def check_target(out: Place) -> None:
    """Refuse a target that is not ours to replace.

    Raises:
        OutputError: it exists and no merge of ours lies there.
    """
    if out.exists() and not any((out / name).exists() for name in (PLAN_FILE, MANIFEST_FILE, STATE_FILE)):
        raise OutputError(f"{out} exists and is not a merge made by simmerge; choose another directory or remove it")


def read_journals(partial: Place) -> dict[str, TensorReport]:
    """Finished tensors of an unfinished merge. A line cut off by a kill does not count."""
    found = {}
    for journal in list_places(partial, f"{JOURNAL}*"):
        for line in journal.read_bytes().split(b"\n")[:-1]:
            entry = json.loads(line)
            found[entry["name"]] = TensorReport(entry["name"], entry["not_finite"], tuple(entry["fell_back"]))
    return found


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
        see `write_graph`.
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


def default_threads() -> int:
    """As many as there are cores for this process, at most `MAX_THREADS`."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


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


@contextmanager
def _partial_directory(graph: MergeGraph, out: Path, layout: Layout, inputs: Mapping[str, str]) -> Iterator[Path]:
    """The hidden sibling that is filled: an earlier one of the same merge, or a new one with preallocated files.

    inputs: fingerprint of every checkpoint.
    """
    partial = out.absolute().with_name(f".{out.name}.partial")
    state = {
        "graph": graph.digest(),
        "inputs": dict(inputs),
        "files": {shard.file: shard.num_bytes for shard in layout.shards},
        # After a crash of the machine the journal could know more than the disk.
        "boot": _boot_id(),
    }
    with _locked_directory(partial, out):
        try:
            if not _is_state(partial, state):
                _empty(partial)
                _check_space(partial, layout)
                preallocate(partial, layout)
                write_json(partial / STATE_FILE, state)
            yield partial
        except InputError:
            shutil.rmtree(partial, ignore_errors=True)  # the same call would fail again
            raise


@contextmanager
def _locked_directory(partial: Path, out: Path) -> Iterator[None]:
    """Make the directory and lock it: no lock file that could be left, and the lock moves with a rename."""
    while True:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(partial, os.O_RDONLY)
        except OSError as error:
            raise OutputError(f"cannot write to {partial.parent}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if partial.exists() and partial.stat().st_ino == os.fstat(descriptor).st_ino:
                yield
                return
        except BlockingIOError:
            raise OutputError(f"another process is writing {out}") from None
        finally:
            os.close(descriptor)


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


def _is_state(partial: Path, state: Mapping[str, Any]) -> bool:
    try:
        found = json.loads((partial / STATE_FILE).read_text())
    except (OSError, ValueError):
        return False
    sizes = state["files"]
    return bool(digest_json(found) == digest_json(state)) and all(
        (partial / name).exists() and (partial / name).stat().st_size == size for name, size in sizes.items()
    )


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _check_space(partial: Path, layout: Layout) -> None:
    free = shutil.disk_usage(partial).free
    if free < layout.num_bytes:
        raise OutputError(
            f"{partial.parent} has {free / 1e9:.2f} GB free, the merge needs {layout.num_bytes / 1e9:.2f} GB"
        )


def result_of(out: Place, layout: Layout, reports: Mapping[str, TensorReport], num_resumed: int) -> MergeResult:
    steps = sorted({step for report in reports.values() for step in report.fell_back})
    fell_back = {step: tuple(sorted(r.name for r in reports.values() if step in r.fell_back)) for step in steps}
    not_finite = tuple(sorted(report.name for report in reports.values() if report.not_finite))
    num_bytes = sum(placement.output.num_bytes for placement in layout.placements)
    return MergeResult(out, num_bytes, num_resumed, not_finite, fell_back, len(reports))


def write_beside(
    graph: MergeGraph,
    partial: Path,
    layout: Layout,
    result: MergeResult,
    fingerprints: Mapping[str, str],
    predicted: Mapping[str, Any] | None,
    seconds: float,
) -> None:
    """Everything that stands beside the weights."""
    if (index := layout.index()) is not None:
        (partial / "model.safetensors.index.json").write_text(index)
    write_json(partial / "config.json", dict(graph.config))
    origin = graph.checkpoints[graph.tokenizer_from].path
    for name in sorted((file_names(origin) or set()).intersection(_COPIED_FILES)):
        (partial / name).write_bytes((origin / name).read_bytes())
    (partial / "README.md").write_text(model_card(graph, predicted, result.not_finite))
    if graph.mergekit is not None:
        (partial / "mergekit_config.yml").write_text(graph.mergekit)
    inputs = {f"checkpoint {key}": fingerprint for key, fingerprint in fingerprints.items()}
    found = {
        "num_bytes": result.num_bytes,
        "not_finite": list(result.not_finite),
        "fell_back": {str(step): list(names) for step, names in result.fell_back.items()},
    }
    Manifest("merge", dict(graph.description), inputs).write(partial / MANIFEST_FILE, seconds, found)


def _publish(partial: Path, out: Path) -> None:
    """Rename. Safe against any end of this process; like its peers it does not wait for the disk (a crash of the
    machine within seconds may lose what a new merge makes again)."""
    for name in (STATE_FILE, *(path.name for path in partial.glob(f"{JOURNAL}*"))):
        (partial / name).unlink(missing_ok=True)
    publish_directory(partial, out)
