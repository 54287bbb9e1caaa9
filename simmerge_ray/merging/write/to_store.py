"""A merge written into a store: file by file, each made on a disk of whoever makes it, and uploaded in parts.

While it is under way the directory has no `config.json`, so no program takes it for a checkpoint; that comes when all
else is there, and the list of all objects last. What is finished is noted in the store, so an interrupted merge goes on
from any node. Disk: the largest file (`max_shard_bytes`) for every file that is being made.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simmerge_ray.base.errors import InputError, OutputError
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
from simmerge_ray.merging.engine.compute import TensorReport
from simmerge_ray.merging.graph import MergeGraph
from simmerge_ray.merging.write.layout import Layout, Shard, preallocate
from simmerge_ray.merging.write.output import STATE_FILE, MergeOutput, MergeResult
from simmerge_ray.merging.write.tensors import JOURNAL, Progress, read_journals, write_tensors

_LAST = "config.json"


def write_to_store(work: MergeOutput, out: RemotePath) -> MergeResult:
    """`directory.write_graph` for a target in a store. Without a runner one file after the other is made here.

    Raises StorageError, too: the store does not take it, in all tries; the next call goes on.
    """
    try:
        reports = _begin(out, work.state)
        num_resumed = len(reports)
        missing = [s for s in work.layout.shards if any(p.output.name not in reports for p in s.placements)]
        if missing:
            missing = [replace(shard, placements=work.trimmed_outputs(shard.placements)) for shard in missing]
            graph, options, num_bytes = work.trimmed, work.options, work.graph.num_bytes
            if options.runner is not None:
                reports |= options.runner.make_files(graph, missing, out, options.progress, num_bytes)
            else:
                reports |= _make_here(graph, missing, out, options.progress, options.num_threads)
        result = work.result(reports, num_resumed)
        _end(work, out, result)
    except InputError:
        for name in (*work.state["files"], STATE_FILE):  # the same call would fail again
            (out / name).unlink(missing_ok=True)
        _remove_journals(out)
        raise
    return result


def make_file(
    graph: MergeGraph, shard: Shard, out: RemotePath, num_threads: int | None, progress: Progress | None = None
) -> dict[str, TensorReport]:
    """Make one file on a disk here, upload it, and note its tensors as finished; their reports.

    Raises as `write_graph`; OutputError also where the disk has too little space.
    """
    with scratch_directory() as scratch:
        free = shutil.disk_usage(scratch).free
        if free < shard.num_bytes:
            raise OutputError(
                f"{scratch.parent} has {free / 1e9:.2f} GB free, {shard.file} needs "
                f"{shard.num_bytes / 1e9:.2f} GB before it is uploaded; set TMPDIR, or make files smaller"
            )
        preallocate(scratch, Layout((shard,)))
        write_tensors(graph, scratch, shard.placements, JOURNAL, progress, num_threads)
        (out / shard.file).upload(scratch / shard.file)
        write_atomically(out / f"{JOURNAL}.{Path(shard.file).stem}", (scratch / JOURNAL).read_bytes())
        return read_journals(scratch)


def _make_here(
    graph: MergeGraph, shards: Sequence[Shard], out: RemotePath, progress: Progress | None, num_threads: int | None
) -> dict[str, TensorReport]:
    reports: dict[str, TensorReport] = {}
    total, left = graph.num_bytes, sum(p.output.num_bytes for shard in shards for p in shard.placements)
    for shard in shards:
        before = total - left

        def tell(done: int, _: int, before: int = before) -> None:
            if progress:
                progress(before + done, total)

        reports |= make_file(graph, shard, out, num_threads, tell)
        left -= sum(p.output.num_bytes for p in shard.placements)
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
    _remove_journals(out)
    write_json(out / STATE_FILE, state)
    return {}


def _end(work: MergeOutput, out: RemotePath, result: MergeResult) -> None:
    """What stands beside the weights, and last what makes the directory a checkpoint."""
    try:
        is_ours = digest_json(read_json(out / STATE_FILE)) == digest_json(work.state)
    except FileNotFoundError:
        is_ours = (out / _LAST).exists()  # another process that made the same merge was faster
    if not is_ours:
        raise OutputError(f"another process is writing {out}")
    with scratch_directory() as beside:
        work.write_beside(beside, result)
        upload_directory(beside, out, _LAST, work.state["files"])
    (out / STATE_FILE).unlink(missing_ok=True)
    _remove_journals(out)


def _remove_journals(out: RemotePath) -> None:
    for journal in list_places(out, f"{JOURNAL}*"):
        journal.unlink(missing_ok=True)
