"""Interrupt the demo in every stage, or a merge at random moments, and compare what comes out with an undisturbed run.

`python -m benchmarks.soak demo [DIRECTORY] [--seed 0]`: Ctrl-C and kill -9 in every stage. It ends with an error if a
process is left behind, an interrupted run does not go on, or the finished run differs from the undisturbed one.

`python -m benchmarks.soak merge PLAN [--kills 20] [--seed 0]`: SIGKILL, then the same command again. It ends with an
error if a directory under the final name is incomplete at any moment that is looked at, or the finished one differs.

Both print a Markdown table.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks import processes
from benchmarks.measuring import markdown, script_parser, seconds_of
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.base.storage import read_json
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.search.labels import LabelStore, Measured
from simmerge_ray.signals.table import read_signal_table

# Seconds into the stage after which the signal is sent, at most: about how long the tiny demo's stages take.
STAGES = {"zoo": 10.0, "signals": 8.0, "search": 12.0, "train": 0.1, "choices": 25.0, "pick": 8.0, "report": 1.0}
SIGNALS = {"Ctrl-C": (signal.SIGINT, 130), "kill -9": (signal.SIGKILL, -9)}  # and the exit codes
_TIMED_FILES = {"simmerge_manifest.json"}  # holds seconds


def start_demo(layout: RunLayout) -> subprocess.Popen[str]:
    """The tiny demo on a cluster of its own; the path is relative, as users give it: workers may run elsewhere."""
    return processes.start("-m", "tests.e2e.tiny_demo", os.path.relpath(layout.root, processes.ROOT))


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for an undisturbed end."""
    output = process.communicate(timeout=600)[0]
    if process.returncode != 0:
        raise SystemExit(f"{process.args} ended with {process.returncode}:\n{output}")


def interrupt_in(layout: RunLayout, stage: str, number: int, delay: float) -> tuple[int, int, float]:
    """Returns exit code, number of processes the run had, and how long the last of them lived on, in seconds.

    Raises:
        SystemExit: the run ended by itself before the stage, or a process is left behind.
    """
    process = start_demo(layout)
    assert process.stdout is not None
    if not any(line.startswith(stage) and "…" in line for line in process.stdout):
        raise SystemExit(f"the run ended with {process.wait()} before it reached {stage}")
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        code, family = processes.interrupt(process, number)
    else:
        raise SystemExit(f"the run ended with {process.returncode} within {delay:.1f} s of {stage}")
    return code, len(family), seconds_of(lambda: processes.assert_gone(family, 30))


def outcome(layout: RunLayout) -> dict[str, object]:
    """Everything that a run found out, without times."""
    return {
        "signals": read_signal_table(layout.signals),
        "labels": [
            (one.key, one.outcome.items.tolist() if isinstance(one.outcome, Measured) else one.outcome)
            for one in LabelStore(layout.labels).read()
        ],
        "headroom": read_json(layout.headroom),
        "selector": (layout.selector / "selector.safetensors").read_bytes(),
        "choices": read_json(layout.choices / "choices.json"),
        "pick": read_json(layout.pick / "pick.json"),
        "merged checkpoint": (layout.pick / "merged" / "model.safetensors").read_bytes(),
    }


def soak_demo(root: Path, generator: random.Random) -> None:
    undisturbed, layout = RunLayout(root / "undisturbed"), RunLayout(root / "interrupted")
    finish(start_demo(undisturbed))
    print(markdown(("stage", "interrupted by", "after (s)", "exit code", "its processes", "all gone after (s)"), ()))
    for stage, longest in STAGES.items():
        for name, (number, expected) in SIGNALS.items():
            delay = generator.uniform(0, longest)
            code, num_processes, seconds = interrupt_in(layout, stage, number, delay)
            print(f"| {stage} | {name} | {delay:.1f} | {code} | {num_processes} | {seconds:.0f} |", flush=True)
            if code != expected:
                raise SystemExit(f"exit code {code} after {name} in {stage}")
    finish(start_demo(layout))
    found = outcome(layout)
    for name, one in outcome(undisturbed).items():
        print(f"{name}: {'the same as undisturbed' if one == found[name] else 'DIFFERENT'}")
        if one != found[name]:
            raise SystemExit(1)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in _TIMED_FILES}


def soak_merge(plan: Path, num_kills: int, generator: random.Random, root: Path) -> None:
    def merge(out: str) -> subprocess.Popen[str]:
        return processes.start("-m", "simmerge_ray.cli.app", "merge", plan.absolute(), root / out)

    finish(merge("whole"))  # compiles the loops, too
    shutil.rmtree(root / "whole")
    longest = seconds_of(lambda: finish(merge("whole")))
    expected = contents(root / "whole")
    print(f"uninterrupted: {longest:.2f} s\n")
    print(markdown(("kill", "after (s)", "it was", "tensors there then", "finished", "same bytes"), ()))
    out, journal = root / "out", root / ".out.partial" / "merge.journal"
    for number in range(1, num_kills + 1):
        delay = generator.uniform(0, longest)
        process = merge("out")
        time.sleep(delay)
        was = "killed" if processes.interrupt(process, signal.SIGKILL)[0] == -signal.SIGKILL else "finished before"
        there = len(journal.read_bytes().splitlines()) if journal.exists() else 0
        if out.exists():
            read_headers(CheckpointRef("out", out))
            assert contents(out) == expected, "an incomplete directory under the final name"
        again = merge("out")
        again.communicate()
        same = contents(out) == expected
        print(f"| {number} | {delay:.2f} | {was} | {there} | {again.returncode == 0} | {same} |", flush=True)
        left = sorted(path.name for path in root.iterdir())
        if again.returncode != 0 or not same or left != ["out", "whole"]:
            raise SystemExit(f"kill {number}: exit code {again.returncode}, same bytes {same}, left {left}")
        shutil.rmtree(out)
    shutil.rmtree(root)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("what", choices=("demo", "merge"))
    parser.add_argument("path", type=Path, nargs="?", help="directory of the runs, or the plan of the merge")
    parser.add_argument("--kills", type=int, default=20, help="of a merge")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.what == "merge" and not given.path:
        parser.error("merge needs a plan")
    generator, scratch = random.Random(given.seed), Path(tempfile.mkdtemp(prefix="simmerge-soak-"))
    if given.what == "demo":
        soak_demo(given.path or scratch, generator)
    else:
        soak_merge(given.path, given.kills, generator, scratch)


if __name__ == "__main__":
    main()
