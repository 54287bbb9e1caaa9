"""What the campaigns of the search share: a private environment, and their command line."""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import tempfile
from pathlib import Path

from benchmarks.measuring import script_parser, thread_variables


def make_private() -> None:
    """One thread a process, and a home of our own for Ray's token; call before any library is imported."""
    # What vLLM keeps of model classes stays, as on any machine where it has run before.
    os.environ.setdefault("VLLM_CACHE_ROOT", str(Path.home() / ".cache" / "vllm"))
    home = tempfile.mkdtemp(prefix="simmerge-bench-home-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ.update(
        thread_variables(),
        HF_HUB_OFFLINE="1",
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
    parser = script_parser(description)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished demo run; only read")
    parser.add_argument("--out", type=Path, required=True, help="directory for results")
    return parser
