"""One side of a comparison in a process of its own: reads jobs as JSON lines, answers with seconds.

`PYTHON worker.py ours|copy|mergekit`, in the interpreter that has what the side needs; standard library only besides.
For each job {"plan", "config", "out", "inputs", "out_bytes"} the worker removes `out`, runs the merge and answers
{"wall_s", "cpu_s"}: wall clock and CPU seconds of all threads and children of the process during the call alone.
Imports and reading the plan or the YAML are not in it, and mergekit is spared its model card and tokenizer.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHUNK_BYTES = 8 << 20
BUFFER = bytearray(CHUNK_BYTES)
Job = dict[str, Any]


def ours(job: Job) -> Callable[[], object]:
    """Our engine."""
    from simmerge_ray.merging.write.directory import write_merge
    from simmerge_ray.plans.plan import read_plan

    resolved = read_plan(Path(job["plan"]))[0]
    return lambda: write_merge(resolved, Path(job["out"]))


def mergekit(job: Job) -> Callable[[], object]:
    """The peer."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(json.loads(Path(job["config"]).read_text()))
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    return lambda: run_merge(config, job["out"], options)


def copy(job: Job) -> Callable[[], object]:
    """The yardstick: read every byte that the merge reads, write as many as it writes."""
    return lambda: copy_bytes([Path(file) for file in job["inputs"]], Path(job["out"]), job["out_bytes"], BUFFER)


def copy_bytes(inputs: list[Path], out: Path, out_bytes: int, buffer: bytearray) -> None:
    """Read the inputs in chunks into one buffer; after each chunk write from it, until `out_bytes` are written."""
    out.mkdir(parents=True)
    target = os.open(out / "copy.bin", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    written = 0
    view = memoryview(buffer)
    try:
        for file in inputs:
            source, offset = os.open(file, os.O_RDONLY), 0
            try:
                while count := os.preadv(source, [buffer], offset):
                    offset += count
                    if written < out_bytes:
                        written += os.pwrite(target, view[: min(count, out_bytes - written)], written)
            finally:
                os.close(source)
        if written != out_bytes:
            raise ValueError(f"the inputs have {written} bytes, fewer than the output's {out_bytes}")
    finally:
        os.close(target)


SIDES = {"ours": ours, "copy": copy, "mergekit": mergekit}


def cpu_s() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main(side: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the sides print goes to stderr
    for line in sys.stdin:
        job = json.loads(line)
        shutil.rmtree(job["out"], ignore_errors=True)
        run = SIDES[side](job)
        wall, cpu = time.perf_counter(), cpu_s()
        run()
        print(json.dumps({"wall_s": time.perf_counter() - wall, "cpu_s": cpu_s() - cpu}), file=answers)


if __name__ == "__main__":
    main(sys.argv[1])
