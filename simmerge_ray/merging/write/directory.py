"""Write a merge as a Hugging Face checkpoint directory: in parallel, resumable, whole or absent."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simmerge_ray.base.errors import InputError, OutputError
from simmerge_ray.base.storage import Place, RemotePath, digest_json, publish_directory, read_json, write_json
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.engine.global_trims import global_steps
from simmerge_ray.merging.graph import MergeGraph
from simmerge_ray.merging.write.layout import MAX_SHARD_BYTES, Layout, preallocate
from simmerge_ray.merging.write.output import STATE_FILE, MergeOutput, MergeResult, WriteOptions, check_target
from simmerge_ray.merging.write.tensors import JOURNAL, Progress, read_journals, write_tensors
from simmerge_ray.merging.write.to_store import write_to_store
from simmerge_ray.plans.plan import ResolvedPlan


def write_merge(
    resolved: ResolvedPlan,
    out: Place,
    predicted: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    num_threads: int | None = None,
    strict: bool = False,
) -> MergeResult:
    """Write the merge of a plan, as `write_graph`; the plan is written beside the weights, with predicted utilities.

    Raises IncompatibleCheckpointsError, too: the inputs do not fit each other.
    """
    options = WriteOptions(predicted, progress, max_shard_bytes, num_threads, strict, resolved)
    return write_graph(compile_plan(resolved), out, options)


def write_graph(graph: MergeGraph, out: Place, options: WriteOptions | None = None) -> MergeResult:
    """Write the merge of a graph into the directory `out`, which appears under its name only when complete.

    Until then it is a hidden sibling; in a store, objects without a `config.json` (see `to_store`). After Ctrl-C, a
    kill or a lost worker the next call with the same graph and unchanged inputs goes on where it stopped; after an
    error of the list below nothing is left.

    Raises:
        OutputError: the target is something else, cannot be written, or has too little space.
        PlanError: see `global_trims.global_steps`.
        CheckpointError: an input ends early, integer tensors differ, or (strict) the result is not finite.
    """
    check_target(graph, out)
    global_steps(graph)
    work = MergeOutput(graph, out, options or WriteOptions())
    return write_to_store(work, out) if isinstance(out, RemotePath) else _write_to_directory(work, out)


def _write_to_directory(work: MergeOutput, out: Path) -> MergeResult:
    options, num_bytes = work.options, work.graph.num_bytes
    with _partial_directory(work, out) as partial:
        done = read_journals(partial)
        if missing := [p for p in work.layout.placements if p.output.name not in done]:
            placements = work.trimmed_outputs(missing)
            if options.runner:
                options.runner(work.trimmed, partial, placements, options.progress, num_bytes)
            else:
                write_tensors(
                    work.trimmed, partial, placements, JOURNAL, options.progress, options.num_threads, num_bytes
                )
        result = work.result(read_journals(partial), len(done))
        work.write_beside(partial, result)
        # Safe against any end of this process; like its peers it does not wait for the disk (a crash of the machine
        # within seconds may lose what a new merge makes again).
        for name in (STATE_FILE, *(path.name for path in partial.glob(f"{JOURNAL}*"))):
            (partial / name).unlink(missing_ok=True)
        publish_directory(partial, out)
    return result


@contextmanager
def _partial_directory(work: MergeOutput, out: Path) -> Iterator[Path]:
    """The hidden sibling that is filled: an earlier one of the same merge, or a new one with preallocated files."""
    partial = out.absolute().with_name(f".{out.name}.partial")
    # After a crash of the machine the journal could know more than the disk.
    state = work.state | {"boot": _boot_id()}
    with _locked_directory(partial, out):
        try:
            if not _is_state(partial, state):
                for path in partial.iterdir():
                    path.unlink()
                _check_space(partial, work.layout)
                preallocate(partial, work.layout)
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


def _is_state(partial: Path, state: Mapping[str, Any]) -> bool:
    try:
        found = read_json(partial / STATE_FILE)
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
