"""What both comparisons need: the same merge as our plan and as mergekit's YAML, and workers that run it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

from benchmarks.measuring import PeakMemory, anonymous_bytes, on_cores, pinned_environment
from benchmarks.merge.mergekit_env import ROOT
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef

OUR_PYTHON = Path(sys.executable)
WORKER = Path(__file__).with_name("worker.py")


def job(operator: str, checkpoints: dict[str, Path], directory: Path) -> dict[str, Any]:
    """Write the merge of `a` and `b` with equal weights as plan.json and config.yml; returns the worker's job.

    Raises:
        ValueError: an operator other than linear, slerp, ties.
    """
    a, b, base = (str(checkpoints[name]) for name in ("a", "b", "base"))
    each: dict[str, dict[str, Any]] = {
        "linear": {"weight": 0.5},
        "slerp": {},
        "ties": {"weight": 0.5, "density": 0.5},
    }
    whole = {
        "linear": {},
        "slerp": {"base_model": a, "parameters": {"t": 0.5}},
        "ties": {"base_model": base, "parameters": {"normalize": True}},
    }
    if operator not in each:
        raise ValueError(f"unknown operator {operator!r}; known: {', '.join(each)}")
    models = [{"model": path, "parameters": each[operator]} for path in (a, b)]
    config = {"merge_method": operator, "models": models, **whole[operator]}
    step = {"left": "a", "right": "b", "operator": operator, "weight": 0.5, "parameters": {}}
    read = (a, b, base) if operator == "ties" else (a, b)
    plan = {
        "steps": [step],
        "checkpoints": {"a": a, "b": b},
        "base": {"id": "base", "path": base} if base in read else None,
    }
    directory.mkdir(parents=True, exist_ok=True)
    plan_file, config_file = directory / f"{operator}.json", directory / f"{operator}.yml"
    plan_file.write_text(json.dumps(plan, indent=2))
    config_file.write_text(json.dumps(config, indent=2))  # JSON is YAML
    inputs = [str(file) for path in read for file in weight_files(Path(path))]
    return {
        "plan": str(plan_file),
        "config": str(config_file),
        "inputs": inputs,
        "out_bytes": _tensor_bytes(Path(a)),
    }


def check_complete(work: dict[str, Any], out: Path) -> None:
    """Refuse a time that was not taken for the whole merge.

    Raises:
        RuntimeError: the output does not hold as many bytes of tensors as the first input.
    """
    found = _tensor_bytes(out)
    if found != work["out_bytes"]:
        raise RuntimeError(f"{out} holds {found} bytes of tensors, not {work['out_bytes']}")


def _tensor_bytes(checkpoint: Path) -> int:
    return sum(spec.num_bytes for spec in read_headers(CheckpointRef(checkpoint.name, checkpoint)).values())


def weight_files(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("*.safetensors"))


def warm_memory(work: dict[str, Any], directory: Path) -> None:
    """Read a job's inputs to their ends, then write and remove a file as large as its output, in the directory of that.

    The host of a virtual machine takes idle pages back, those of the page cache and free ones: who touches them first
    would wait for the disk or for memory.
    """
    buffer = bytearray(1 << 23)
    for file in work["inputs"]:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    scratch = directory / "warm-memory"
    with open(scratch, "wb", buffering=0) as stream:
        for start in range(0, work["out_bytes"], len(buffer)):
            stream.write(buffer[: work["out_bytes"] - start])
    scratch.unlink()


class Worker:
    """A `worker.py`; peak anonymous memory is sampled while it works.

    warm_up: a tiny job of the same operator and where its result goes, run before the first figure is taken: what a
    side imports and loads for its first merge is not what a merge needs.
    """

    def __init__(
        self, side: str, python: Path, num_threads: int, warm_up: tuple[dict[str, Any], Path] | None = None
    ) -> None:
        self.side = side
        self.peak_bytes = 0
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (until close)
        command = [python, "-P", WORKER, side]
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
        environment = pinned_environment(num_threads) | ({"PYTHONPATH": path} if side == "ours" else {"PYTHONPATH": ""})
        with on_cores(num_threads):
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
            )
        if warm_up is not None:
            self.run(*warm_up)
            shutil.rmtree(warm_up[1])
        self.imports_bytes, self.peak_bytes = anonymous_bytes(self._process.pid), 0

    def run(self, work: dict[str, Any], out: Path) -> dict[str, float]:
        """Run one job; returns wall_s and cpu_s."""
        assert self._process.stdin is not None
        os.sync()  # so that nobody pays for what the one before left to write back
        if "inputs" in work:  # a job that is timed
            warm_memory(work, out.parent)
        with PeakMemory(self._process.pid) as memory:
            self._process.stdin.write(json.dumps(work | {"out": str(out)}) + "\n")
            self._process.stdin.flush()
            seconds = self._answer()
        self.peak_bytes = max(self.peak_bytes, memory.peak)
        return seconds

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    @property
    def peak_above_imports_bytes(self) -> int:
        return self.peak_bytes - self.imports_bytes

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            tail = b"\n".join(deque(self._log.read().splitlines(), 5)).decode(errors="replace")
            raise RuntimeError(f"{self.side} ended with {self._process.returncode}:\n{tail}")
        return json.loads(line)
