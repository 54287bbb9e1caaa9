"""Time, CPU and memory of a merge: our engine, mergekit 0.1.5, and copying the same bytes.

`python -m benchmarks.merge.speed FIXTURES [--sizes 134m,1b] [--operators linear,slerp,ties] [--rounds 5] ...`, where
FIXTURES is the directory of `benchmarks.merge.fixtures` (made when it is not there). For each size and operator:

- in process: one worker process a side, which imports first and merges a tiny model; then rounds of ours, copy,
  mergekit, one after the other, after one round that is not counted. A figure is the median over the rounds. The
  copy reads the bytes of all inputs in 8 MiB chunks into one buffer and writes as many bytes as the merge does.
- memory: the largest RssAnon seen in that worker, sampled every 5 ms, minus what it was after the imports and the tiny
  merge of the same operator (which loads the compiled kernels).
- command (134m only): `simmerge merge plan.json out` and `mergekit-yaml config.yml out`, alternating, from start to
  exit.

Just before every timed run, of every side alike, all dirty pages are written back, all input files are read to their
ends, and a file as large as the output is written and removed: the host of a virtual machine takes idle pages back, and
one side would else wait for the disk or for memory and another not.

`--threads N` (default 1) gives every side the same: N threads to each math library, and N cores, by affinity, since
our engine takes its threads from the cores it may use. The copy is one stream whatever N is, so a speed relative to the
copy is like for like only with N = 1. JSON goes to --json, Markdown to stdout.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measuring import alternate, machine, markdown, on_cores, pinned_environment, script_parser
from benchmarks.merge.fixtures import make_fixture
from benchmarks.merge.mergekit_env import DEFAULT_DIRECTORY, mergekit_python
from benchmarks.merge.sides import OUR_PYTHON, Worker, check_complete, job, warm_memory

Work = dict[str, Any]  # a job of `sides`
Sides = dict[str, dict[str, Any]]
Seconds = dict[str, float]  # wall_s and cpu_s


def medians(sides: Mapping[str, Callable[[Path], Seconds]], work: Work, scratch: Path, num_rounds: int) -> Sides:
    """Alternate the sides, each into a directory of its own; of each the seconds of every round and their medians."""

    def one(side: str, run: Callable[[Path], Seconds]) -> Seconds:
        out = scratch / side
        seconds = run(out)
        if side != "copy":
            check_complete(work, out)
        shutil.rmtree(out)
        print(f"  {side}: {seconds['wall_s']:.2f} s", file=sys.stderr, flush=True)
        return seconds

    found = alternate({side: partial(one, side, run) for side, run in sides.items()}, num_rounds)
    return {
        side: {what: median(one[what] for one in rounds) for what in ("wall_s", "cpu_s")} | {"rounds": rounds}
        for side, rounds in found.items()
    }


def in_process(
    work: Work, warm_up: Work, scratch: Path, venv: Path, num_rounds: int, num_threads: int, sides: Sequence[str]
) -> Sides:
    """Medians of workers, and their peak memory."""
    workers: dict[str, Worker] = {}
    try:
        for side in sides:
            python = mergekit_python(venv) if side == "mergekit" else OUR_PYTHON
            workers[side] = Worker(side, python, num_threads, (warm_up, scratch / side))
        found = medians({side: partial(one.run, work) for side, one in workers.items()}, work, scratch, num_rounds)
        for side, worker in workers.items():
            found[side]["peak_anonymous_bytes_above_imports"] = worker.peak_bytes - worker.imports_bytes
            found[side]["anonymous_bytes_of_imports"] = worker.imports_bytes
        return found
    finally:
        for worker in workers.values():
            worker.close()


def commands(work: Work, scratch: Path, venv: Path, num_rounds: int, num_threads: int) -> Sides:
    """Medians of the two commands, from start to exit."""
    simmerge, peer = OUR_PYTHON.with_name("simmerge"), mergekit_python(venv).with_name("mergekit-yaml")

    def run(command: Sequence[Path | str], out: Path) -> Seconds:
        os.sync()
        warm_memory(work, scratch)
        return _timed([*map(str, command), str(out)], num_threads, scratch)

    command_of = {"ours": [simmerge, "merge", work["plan"]], "mergekit": [peer, work["config"]]}
    return medians({side: partial(run, one) for side, one in command_of.items()}, work, scratch, num_rounds)


def _timed(command: list[str], num_threads: int, directory: Path) -> dict[str, float]:
    with open(directory / "command.log", "w+b") as log:
        started = time.perf_counter()
        with on_cores(num_threads):
            process = subprocess.Popen(
                command, env=pinned_environment(num_threads), cwd=directory, stdout=log, stderr=subprocess.STDOUT
            )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            output = log.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{command[0]} ended with {process.returncode}:\n{output}")
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime}


def report(result: dict[str, Any]) -> str:
    """The tables for people."""
    where = result["machine"]
    about = (
        f"{where['cpu']}, {where['num_cpus']} cores, load {where['load']:.1f} at start, {where['date']}, "
        f"{result['num_threads']} thread(s) and core(s) a side, medians of {result['num_rounds']} alternating rounds"
    )
    header = ["size", "operator", "GB in + out", "ours s (CPU s)", "copy s (CPU s)", "mergekit s (CPU s)"]
    header += [
        "ours / copy speed (CPU)",
        "mergekit / ours wall",
        "mergekit / ours CPU",
        "ours peak MB",
        "mergekit peak MB",
    ]
    rows = []
    for row in result["in_process"]:
        ours, copy, peer = (row["sides"].get(side) for side in ("ours", "copy", "mergekit"))
        rows.append(
            [
                row["size"],
                row["operator"],
                f"{row['num_bytes'] / 1e9:.2f}",
                *map(_seconds, (ours, copy, peer)),
                f"{_ratio(copy, ours, 'wall_s', '.0%')} ({_ratio(copy, ours, 'cpu_s', '.0%')})",
                _ratio(peer, ours, "wall_s"),
                _ratio(peer, ours, "cpu_s"),
                *(f"{side['peak_anonymous_bytes_above_imports'] / 1e6:.0f}" if side else "-" for side in (ours, peer)),
            ]
        )
    tables = [about, markdown(header, rows)]
    if result["commands"]:
        sides = [(row["operator"], row["sides"]["ours"], row["sides"]["mergekit"]) for row in result["commands"]]
        rows = [[op, _seconds(ours), _seconds(peer), _ratio(peer, ours, "wall_s")] for op, ours, peer in sides]
        tables.append(markdown(["whole command", "ours s (CPU s)", "mergekit s (CPU s)", "mergekit / ours wall"], rows))
    return "\n\n".join(tables)


def _ratio(side: dict[str, Any] | None, other: dict[str, Any] | None, what: str, shown: str = ".1f") -> str:
    return format(side[what] / other[what], shown) if side and other else "-"


def _seconds(side: dict[str, Any] | None) -> str:
    return f"{side['wall_s']:.2f} ({side['cpu_s']:.2f})" if side else "-"


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("fixtures", type=Path)
    parser.add_argument("--venv", type=Path, default=DEFAULT_DIRECTORY, help="mergekit's environment")
    parser.add_argument("--sizes", default="134m", help="134m, 1b or both")
    parser.add_argument("--operators", default="linear,slerp,ties")
    parser.add_argument("--sides", default="ours,copy,mergekit", help="who takes part in process")
    parser.add_argument("--rounds", type=int, default=5, help="rounds counted, each after one that is not")
    parser.add_argument("--command-rounds", type=int, default=5, help="rounds of the whole commands; 0: leave them out")
    parser.add_argument("--threads", type=int, default=1, help="threads of each math library, and cores, of every side")
    parser.add_argument("--json", type=Path, help="write every round here")
    arguments = parser.parse_args()
    root, venv = arguments.fixtures.absolute(), arguments.venv.absolute()
    result: dict[str, Any] = {"machine": machine(), "num_threads": arguments.threads, "num_rounds": arguments.rounds}
    result |= {"in_process": [], "commands": []}
    # Beside the fixtures: the same file system for all, and for inputs and outputs.
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="speed-", dir=root) as name:
        scratch = Path(name)
        tiny = make_fixture(root, "tiny", venv)
        for size in arguments.sizes.split(","):
            checkpoints = make_fixture(root, size, venv)
            for operator in arguments.operators.split(","):
                print(f"{size} {operator}", file=sys.stderr, flush=True)
                work = job(operator, checkpoints, scratch / size)
                num_bytes = sum(Path(file).stat().st_size for file in work["inputs"]) + work["out_bytes"]
                warm_up = job(operator, tiny, scratch / "tiny")
                chosen = arguments.sides.split(",")
                sides = in_process(work, warm_up, scratch, venv, arguments.rounds, arguments.threads, chosen)
                about = {"size": size, "operator": operator}
                result["in_process"].append(about | {"num_bytes": num_bytes, "sides": sides})
                if size == "134m" and arguments.command_rounds:
                    seconds = commands(work, scratch, venv, arguments.command_rounds, arguments.threads)
                    result["commands"].append(about | {"sides": seconds})
                if arguments.json:
                    arguments.json.write_text(json.dumps(result, indent=2))
    print(report(result))


if __name__ == "__main__":
    main()
