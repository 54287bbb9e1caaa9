"""Every ratio that we claim in one table, with the machine and the date, in twenty minutes on two quiet cores.

    python -m benchmarks.run_all OUT [--fixtures DIR] [--venv DIR] [--run RUN] [--only merge,plans] [--limit 420]

Each part is a script of this folder in a process of its own, shorter than its own default; it keeps its sides in
alternation. `merge` needs mergekit's environment, `serve` a RUN of the demo; a part that cannot run here, fails, or
takes longer than the limit, is a row that says so. OUT/ratios.json and OUT/ratios.md are written after every part: the
ratio, the target of issue 22 where there is one, and whether it was met. A target met on a busy machine says little:
the load at the start is in the table, too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring import machine, markdown, pinned_environment, script_parser, write_result
from benchmarks.merge.mergekit_env import DEFAULT_DIRECTORY

# Lower limits, or upper limits where the name of a ratio says "at most".
TARGETS = {
    "whole command, linear: mergekit / ours, wall": 8.0,
    "whole command, slerp: mergekit / ours, wall": 8.0,
    "whole command, ties: mergekit / ours, wall": 18.0,
    "in process, linear: copy / ours, wall": 0.85,
    "in process, slerp: copy / ours, wall": 0.70,
    "adding one checkpoint to 4 / its own forward pass and read, at most": 1.25,
    "Serve: ceiling, share of the no-op's": 0.45,
    "100 checkpoints, 8-way beam, shortlist and virtual, s, at most": 6.0,
    "50 checkpoints, 3-way, shortlist and virtual, s, at most": 9.0,
}


@dataclass(frozen=True)
class Ratio:
    """One row. value: None where the part gave none; note: why."""

    part: str
    name: str
    value: float | None
    target: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None or self.target is None:
            return None
        return self.value <= self.target if self.name.endswith("at most") else self.value >= self.target


Figures = dict[str, float]


def merge_figures(result: Mapping[str, Any]) -> Figures:
    """Of `merge.speed --json`."""
    found = {}
    for row in result["commands"]:
        ours, peer = row["sides"]["ours"], row["sides"]["mergekit"]
        for what, name in (("wall_s", "wall"), ("cpu_s", "CPU")):
            found[f"whole command, {row['operator']}: mergekit / ours, {name}"] = peer[what] / ours[what]
    for row in result["in_process"]:
        ours = row["sides"]["ours"]["wall_s"]
        for side, name in (("copy", "copy / ours, wall"), ("mergekit", "mergekit / ours, wall")):
            found[f"in process, {row['operator']}: {name}"] = row["sides"][side]["wall_s"] / ours
    return found


def signal_figures(result: Mapping[str, Any]) -> Figures:
    """Of `signals.cost --json`."""
    last = result["rows"][-1]
    return {
        f"signals of {last['size']} checkpoints: pair by pair / ours": last["times_faster"],
        f"signals of {last['size']} checkpoints: ours / floor": last["ours_over_floor"],
        f"adding one checkpoint to {last['size']} / its own forward pass and read, at most": last["adding_over_own"],
    }


def plan_figures(result: Mapping[str, Any]) -> Figures:
    """Of `plans.speed --out`."""
    return {
        **{f"{name}, s, at most": row["wall"] for name, row in result["rows"].items() if "width" in row},
        **{f"{name}: plans/s": row["plans_per_second"] for name, row in result["rows"].items() if "width" not in row},
    }


def serve_figures(result: Mapping[str, Any]) -> Figures:
    """Of `service.load`."""
    return {f"Serve: {name}": float(value) for name, value in result["rows"].items() if not isinstance(value, bool)}


def decision_figures(result: Mapping[str, Any]) -> Figures:
    """Of `service.recommend`."""
    return {"a decision in process, median, us": result["p50_us"], "a decision in process, p99, us": result["p99_us"]}


@dataclass(frozen=True)
class Part:
    """A script with its arguments; it prints JSON, or writes it to the file that follows its last argument."""

    arguments: tuple[str, ...]
    figures: Callable[[Mapping[str, Any]], Figures]
    to_file: bool = True


def parts(fixtures: Path, venv: Path, run: Path | None) -> dict[str, Part | str]:
    """By name; a text says why one cannot run."""
    short = ("--rounds", "2", "--command-rounds", "3", "--venv", str(venv), "--json")
    merge = Part(("merge.speed", str(fixtures), *short), merge_figures)
    cost = Part(("signals.cost", str(fixtures), "--sizes", "4", "--pairs", "1", "--json"), signal_figures)
    has_peer = (venv / "bin" / "python").exists()
    why = f"no mergekit at {venv}: python -m benchmarks.merge.mergekit_env {venv}"
    load = ("--seconds", "60", "--rounds", "4", "--ceiling-seconds", "8")
    return {
        "merge": merge if has_peer else why,
        "signals": cost if has_peer or (fixtures / "134m").exists() else why,
        "plans": Part(("plans.speed", "--out"), plan_figures),
        "decision": Part(("service.recommend", "--calls", "3000"), decision_figures, to_file=False),
        "serve": Part(("service.load", str(run), *load), serve_figures, to_file=False) if run else "needs --run",
    }


def run_part(name: str, part: Part | str, out: Path, limit_s: float) -> list[Ratio]:
    """The rows of a part; one without a value where it gave none."""
    if isinstance(part, str):
        return [Ratio(name, "left out", None, note=part)]
    module, *arguments = part.arguments
    file, log = out / f"{name}.json", out / f"{name}.log"
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, *([str(file)] if part.to_file else [])]
    file.unlink(missing_ok=True)
    try:
        with log.open("w") as errors:
            done = subprocess.run(
                command, env=pinned_environment(), stdout=subprocess.PIPE, stderr=errors, text=True, timeout=limit_s
            )
    except subprocess.TimeoutExpired:
        return [Ratio(name, "left out", None, note=f"took longer than {limit_s:g} s")]
    try:
        result = json.loads(file.read_text()) if part.to_file else first_json(done.stdout)
        found = part.figures(result)
    except (OSError, ValueError, KeyError) as error:
        return [Ratio(name, "left out", None, note=f"ended with {done.returncode}, see {log} ({error!r})")]
    return [Ratio(name, one, value, TARGETS.get(one)) for one, value in found.items()]


def first_json(text: str) -> Any:
    """The first JSON value of an output."""
    return json.JSONDecoder().raw_decode(text.lstrip())[0]


def report(ratios: Sequence[Ratio], where: Mapping[str, Any]) -> str:
    """The table for people."""
    words = {True: "yes", False: "no", None: ""}
    rows = [
        [one.part, one.name, "-" if one.value is None else one.value, one.target or "", words[one.met], one.note]
        for one in ratios
    ]
    about = f"{where['cpu']}, {where['num_cpus']} cores, load {where['load']:.1f} at start, {where['date']}"
    return f"{about}\n\n{markdown(['part', 'ratio', 'value', 'target', 'met', 'note'], rows)}\n"


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fixtures", type=Path, help="of benchmarks.merge.fixtures; default: OUT/fixtures")
    parser.add_argument("--venv", type=Path, default=DEFAULT_DIRECTORY, help="mergekit's environment")
    parser.add_argument("--run", type=Path, help="a run of the demo, for the service")
    parser.add_argument("--only", help="parts, with commas between them")
    parser.add_argument("--limit", type=float, default=420.0, help="seconds for each part")
    given = parser.parse_args()
    out, where = given.out.absolute(), machine()
    out.mkdir(parents=True, exist_ok=True)
    chosen = parts((given.fixtures or out / "fixtures").absolute(), given.venv.absolute(), given.run)
    names = given.only.split(",") if given.only else list(chosen)
    if unknown := [name for name in names if name not in chosen]:
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(chosen)}")
    ratios: list[Ratio] = []
    for name in names:
        started = time.monotonic()
        ratios += run_part(name, chosen[name], out, given.limit)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        write_result(out / "ratios.json", {"ratios": [asdict(one) | {"met": one.met} for one in ratios]})
        (out / "ratios.md").write_text(report(ratios, where))
    print(report(ratios, where))


if __name__ == "__main__":
    main()
