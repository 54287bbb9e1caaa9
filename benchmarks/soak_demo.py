"""Interrupt the demo in every stage, by Ctrl-C and by kill -9, and compare what comes out with an undisturbed run.

`python -m benchmarks.soak_demo [DIRECTORY] [SEED]` prints a Markdown table; it ends with an error if a process is left
behind, an interrupted run does not go on, or the finished run differs from the undisturbed one.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import processes
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.base.storage import read_json
from simmerge_ray.search.labels import LabelStore, Measured
from simmerge_ray.signals.table import read_signal_table

# Seconds into the stage after which the signal is sent, at most: about how long the tiny demo's stages take.
STAGES = {"zoo": 10.0, "signals": 8.0, "search": 12.0, "train": 0.1, "pick": 8.0, "report": 1.0}
SIGNALS = {"Ctrl-C": signal.SIGINT, "kill -9": signal.SIGKILL}


def finish(layout: RunLayout) -> None:
    process = processes.start_tiny_demo(layout)
    output = process.communicate(timeout=600)[0]
    if process.returncode != 0:
        raise SystemExit(f"the run in {layout.root} ended with {process.returncode}:\n{output}")


def interrupt_in(layout: RunLayout, stage: str, number: int, delay: float) -> tuple[int, int, float]:
    """Returns exit code, number of processes the run had, and how long the last of them lived on, in seconds.

    Raises:
        SystemExit: the run ended by itself before the stage, or a process is left behind.
    """
    process = processes.start_tiny_demo(layout)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(stage) and "…" in line:
            break
    else:
        raise SystemExit(f"the run ended with {process.wait()} before it reached {stage}")
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        pass
    else:
        raise SystemExit(f"the run ended with {process.returncode} within {delay:.1f} s of {stage}")
    code, family = processes.interrupt(process, number)
    started = time.monotonic()
    processes.assert_gone([one for one in family if not processes.is_agent(one)], 30)
    processes.assert_gone(family, 120)
    return code, len(family), time.monotonic() - started


def outcome(layout: RunLayout) -> tuple[object, ...]:
    """Everything that a run found out, without times."""
    labels = [
        (one.key, one.outcome.items.tolist() if isinstance(one.outcome, Measured) else one.outcome)
        for one in LabelStore(layout.labels).read()
    ]
    pick = read_json(layout.pick / "pick.json")
    selector = (layout.selector / "selector.safetensors").read_bytes()
    merged = (layout.pick / "merged" / "model.safetensors").read_bytes()
    return read_signal_table(layout.signals), labels, read_json(layout.headroom), selector, pick, merged


def main(root: Path, seed: int) -> None:
    generator = random.Random(seed)
    undisturbed, layout = RunLayout(root / "undisturbed"), RunLayout(root / "interrupted")
    finish(undisturbed)
    print("| stage | interrupted by | after (s) | exit code | its processes | all gone after (s) |")
    print("|---|---|---|---|---|---|")
    for stage, longest in STAGES.items():
        for name, number in SIGNALS.items():
            delay = generator.uniform(0, longest)
            code, num_processes, seconds = interrupt_in(layout, stage, number, delay)
            print(f"| {stage} | {name} | {delay:.1f} | {code} | {num_processes} | {seconds:.0f} |", flush=True)
            if code != (130 if number == signal.SIGINT else -9):
                raise SystemExit(f"exit code {code} after {name} in {stage}")
    finish(layout)
    names = ("signals", "labels", "headroom", "selector", "pick", "merged checkpoint")
    for name, one, other in zip(names, outcome(undisturbed), outcome(layout), strict=True):
        print(f"{name}: {'the same as undisturbed' if one == other else 'DIFFERENT'}")
        if one != other:
            raise SystemExit(1)


if __name__ == "__main__":
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="simmerge-soak-"))
    main(directory, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
