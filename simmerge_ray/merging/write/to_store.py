"""A merge written into a store: file by file, each made on a disk of whoever makes it, and uploaded in parts.

While it is under way the directory has no `config.json`, so no program takes it for a checkpoint; that comes when all
else is there, and the list of all objects last. What is finished is noted in the store, so an interrupted merge goes on
from any node. Disk: the largest file (`max_shard_bytes`) for every file that is being made.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simmerge_ray.base.errors import CheckpointError, InputError, OutputError
from simmerge_ray.base.storage import (
    RemotePath,
    digest_json,
    list_places,
    read_json,
    remove_directory,
    scratch_directory,
    upload_directory,
    write_atomically,
    write_json,
)
from simmerge_ray.checkpoints.references import checkpoint_fingerprint
from simmerge_ray.merging.engine.compute import TensorReport
from simmerge_ray.merging.engine.global_trims import resolve_global_trims
from simmerge_ray.merging.graph import MergeGraph
from simmerge_ray.merging.write.directory import (
    JOURNAL,
    STATE_FILE,
    FileOfMerge,
    MergeResult,
    Progress,
    Runner,
    default_threads,
    read_journals,
    result_of,
    write_beside,
    write_tensors,
)
from simmerge_ray.merging.write.layout import Layout, plan_layout, preallocate

_LAST = "config.json"


def write_to_store(
    graph: MergeGraph,
    out: RemotePath,
    predicted: Mapping[str, Any] | None,
    progress: Progress | None,
    max_shard_bytes: int,
    num_threads: int | None,
    strict: bool,
    finish: Callable[[Path], None] | None,
    runner: Runner | None,
) -> MergeResult:
    """`write.write_graph` for a target in a store. Without a runner one file after the other is made here.

    Raises:
        as `write_graph`. StorageError: the store does not take it, in all tries; the next call goes on.
    """
    started = time.monotonic()
    layout = plan_layout(graph.outputs, max_shard_bytes)
    inputs = {key: checkpoint_fingerprint(ref) for key, ref in graph.checkpoints.items()}
    files = files_of(layout)
    sizes = {file.shard.file: file.shard.num_bytes for file in files}
    state = {"graph": graph.digest(), "inputs": inputs, "files": sizes}
    try:
        reports = _begin(out, state)
        num_resumed = len(reports)
        missing = [file for file in files if any(p.output.name not in reports for p in file.placements)]
        if missing:
            trimmed = resolve_global_trims(graph, num_threads or default_threads())
            made = {output.name: output for output in trimmed.outputs}
            missing = [
                replace(file, placements=tuple(replace(p, output=made[p.output.name]) for p in file.placements))
                for file in missing
            ]
            if runner is not None:
                reports |= runner.make_files(trimmed, missing, out, progress, graph.num_bytes)
            else:
                reports |= _make_here(trimmed, missing, out, progress, num_threads, graph.num_bytes)
        result = result_of(out, layout, reports, num_resumed)
        if strict and result.not_finite:
            raise CheckpointError(f"the merge holds NaN or infinity in {', '.join(result.not_finite[:5])}")
        _end(graph, out, layout, result, inputs, predicted, time.monotonic() - started, finish, state)
    except InputError:
        _remove(out, list(sizes))  # the same call would fail again
        raise
    return result


def files_of(layout: Layout) -> list[FileOfMerge]:
    """The files of a layout, each with its tensors."""
    return [FileOfMerge(shard, tuple(p for p in layout.placements if p.file == shard.file)) for shard in layout.shards]


def make_file(
    graph: MergeGraph, file: FileOfMerge, out: RemotePath, num_threads: int | None, progress: Progress | None = None
) -> dict[str, TensorReport]:
    """Make one file on a disk here, upload it, and note its tensors as finished; their reports.

    Raises:
        OutputError: too little space. Others: as `write_graph`.
    """
    with scratch_directory() as scratch:
        free = shutil.disk_usage(scratch).free
        if free < file.shard.num_bytes:
            raise OutputError(
                f"{scratch.parent} has {free / 1e9:.2f} GB free, {file.shard.file} needs "
                f"{file.shard.num_bytes / 1e9:.2f} GB before it is uploaded; set TMPDIR, or make files smaller"
            )
        preallocate(scratch, Layout((file.shard,), file.placements))
        write_tensors(graph, scratch, file.placements, JOURNAL, progress, num_threads)
        (out / file.shard.file).upload(scratch / file.shard.file)
        write_atomically(out / f"{JOURNAL}.{Path(file.shard.file).stem}", (scratch / JOURNAL).read_bytes())
        return read_journals(scratch)


def _make_here(
    graph: MergeGraph,
    files: Sequence[FileOfMerge],
    out: RemotePath,
    progress: Progress | None,
    num_threads: int | None,
    total: int,
) -> dict[str, TensorReport]:
    reports: dict[str, TensorReport] = {}
    left = sum(p.output.num_bytes for file in files for p in file.placements)
    for file in files:
        before = total - left

        def tell(done: int, _: int, before: int = before) -> None:
            if progress:
                progress(before + done, total)

        reports |= make_file(graph, file, out, num_threads, tell)
        left -= sum(p.output.num_bytes for p in file.placements)
    return reports


def _begin(out: RemotePath, state: Mapping[str, Any]) -> dict[str, TensorReport]:
    """Take the directory for this merge; what an interrupted one of the same kind has finished."""
    try:
        found = digest_json(read_json(out / STATE_FILE))
    except (FileNotFoundError, ValueError):
        found = ""
    if found == digest_json(state):
        return read_journals(out)
    remove_directory(out, _LAST)
    for journal in list_places(out, f"{JOURNAL}*"):
        journal.unlink()
    write_json(out / STATE_FILE, state)
    return {}


def _end(
    graph: MergeGraph,
    out: RemotePath,
    layout: Layout,
    result: MergeResult,
    inputs: Mapping[str, str],
    predicted: Mapping[str, Any] | None,
    seconds: float,
    finish: Callable[[Path], None] | None,
    state: Mapping[str, Any],
) -> None:
    """What stands beside the weights, and last what makes the directory a checkpoint."""
    try:
        ours = json.dumps(read_json(out / STATE_FILE), sort_keys=True) == json.dumps(dict(state), sort_keys=True)
    except FileNotFoundError:
        ours = (out / _LAST).exists()  # another process that made the same merge was faster
    if not ours:
        raise OutputError(f"another process is writing {out}")
    with scratch_directory() as beside:
        write_beside(graph, beside, layout, result, inputs, predicted, seconds)
        if finish:
            finish(beside)
        upload_directory(beside, out, _LAST, {shard.file: shard.num_bytes for shard in layout.shards})
    for name in (out / STATE_FILE, *list_places(out, f"{JOURNAL}*")):
        name.unlink(missing_ok=True)


def _remove(out: RemotePath, files: Sequence[str]) -> None:
    for name in (*files, STATE_FILE):
        (out / name).unlink(missing_ok=True)
    for journal in list_places(out, f"{JOURNAL}*"):
        journal.unlink()
