"""Kill a merge with SIGKILL at random moments, run it again, and compare every byte with an uninterrupted merge.

`python -m benchmarks.soak_merge PLAN [KILLS] [SEED]` prints a Markdown table; it ends with an error if a directory
under the final name is incomplete at any moment that is looked at, or the finished one differs.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef

_TIMED_FILES = {"simmerge_manifest.json"}  # holds seconds


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in _TIMED_FILES}


def merge(plan: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "simmerge_ray.cli.app", "merge", str(plan), str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def main(plan: Path, num_kills: int, seed: int) -> None:
    generator = random.Random(seed)
    root = Path(tempfile.mkdtemp(prefix="simmerge-soak-merge-"))
    merge(plan, root / "whole").wait()  # compiles the loops, too
    shutil.rmtree(root / "whole")
    started = time.monotonic()
    if merge(plan, root / "whole").wait() != 0:
        raise SystemExit("the uninterrupted merge failed")
    longest = time.monotonic() - started
    expected = contents(root / "whole")
    print(
        f"uninterrupted: {longest:.2f} s\n\n| kill | after (s) | it was | tensors there then | finished | same bytes |"
    )
    print("|---|---|---|---|---|---|")
    for number in range(1, num_kills + 1):
        out = root / "out"
        delay = generator.uniform(0, longest)
        process = merge(plan, out)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        was = "killed" if process.wait() == -signal.SIGKILL else "finished before"
        journal = root / ".out.partial" / "merge.journal"
        there = len(journal.read_bytes().splitlines()) if journal.exists() else 0
        if out.exists():
            read_headers(CheckpointRef("out", out))
            assert contents(out) == expected, "an incomplete directory under the final name"
        code = merge(plan, out).wait()
        same = contents(out) == expected
        print(f"| {number} | {delay:.2f} | {was} | {there} | {code == 0} | {same} |", flush=True)
        left = sorted(path.name for path in root.iterdir())
        if code != 0 or not same or left != ["out", "whole"]:
            raise SystemExit(f"kill {number}: exit code {code}, same bytes {same}, left {left}")
        shutil.rmtree(out)
    shutil.rmtree(root)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    kills, chosen = (int(value) for value in (*sys.argv[2:4], *("20", "0")[len(sys.argv[2:4]) :]))
    main(Path(sys.argv[1]), kills, chosen)
