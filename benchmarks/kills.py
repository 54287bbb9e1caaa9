"""`simmerge auto` and `simmerge tune`, killed at random moments and started again: is the answer that of a quiet run?

`python -m benchmarks.kills auto|tune CATALOGUE PROBES --member A --member B [--runs 10] [--seed 0]` runs the command
once in peace, then `--runs` times with kill -9 of its process group at a random moment of the quiet run's time, and the
same command again to its end. Printed for each: the moment, whether the answer is the same (`auto.json`, or the recipe
of `tune`), and how many rows of the label store are there twice (a candidate that was probed twice; must be 0).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import markdown, script_parser
from simmerge_ray.search.labels import LabelStore


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("command", choices=("auto", "tune"))
    parser.add_argument("catalogue", type=Path)
    parser.add_argument("probes", type=Path)
    parser.add_argument("--member", action="append", required=True)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        scratch = Path(name)
        started = time.monotonic()
        _run(arguments, scratch / "quiet")
        seconds, wanted = time.monotonic() - started, _answer(arguments.command, scratch / "quiet")
        rows = []
        for number, moment in enumerate(np.random.default_rng(arguments.seed).uniform(0.0, seconds, arguments.runs)):
            out = scratch / f"killed-{number}"
            was_killed = _run(arguments, out, moment)
            if was_killed:
                _run(arguments, out)
            same = _answer(arguments.command, out) == wanted
            rows.append([f"{moment:.1f} s", was_killed, same, _rows_twice(out)])
            print(rows[-1], flush=True, file=sys.stderr)
            shutil.rmtree(out)
    print(f"{arguments.command}, a quiet run {seconds:.0f} s\n")
    print(markdown(("killed at", "was running", "same answer", "rows twice"), rows))


def _run(arguments: Any, out: Path, moment: float | None = None) -> bool:
    """One run of the command; whether it was still running when it was killed."""
    members = [part for member in arguments.member for part in ("--member", member)]
    options = ["--probes", str(arguments.probes), "--out", str(out), "--log", str(out.with_suffix(".log")), *members]
    if arguments.command == "auto":
        options += ["--evaluator", "transformers"]
    command = [str(Path(sys.executable).with_name("simmerge")), arguments.command, str(arguments.catalogue), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        code = process.wait(moment)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    if code:
        assert process.stderr is not None
        raise SystemExit(f"{' '.join(command)} ended with {code}: {process.stderr.read().decode()[-500:]}")
    return False


def _answer(command: str, out: Path) -> Any:
    """What must be the same: everything but where it lies."""
    if command == "tune":
        content = json.loads((out / "recipe.json").read_text())
        return {key: content[key] for key in ("operator", "parameters", "members")}
    content = json.loads((out / "auto.json").read_text())
    return {key: value for key, value in content.items() if key != "merged"}


def _rows_twice(out: Path) -> int:
    """Rows of the label store beyond the first of each key."""
    if not (out / "labels").exists():
        return 0
    import pyarrow.parquet as pq

    keys = [key for file in (out / "labels").glob("*.parquet") for key in pq.read_table(file)["key"].to_pylist()]
    assert len(LabelStore(out / "labels").read()) == len(set(keys))
    return len(keys) - len(set(keys))


if __name__ == "__main__":
    main()
