"""Kill -9 of drivers, trial actors and nodes while a grid is searched; its labels must be those of a quiet run.

`python -m benchmarks.search.soak_search --run RUN --out DIR [--seed 0] [--drivers 10] [--actors 10] [--nodes 3]` with
the zoo of a finished demo run: five checkpoints, 9 pairs of two tasks with four arms and 6 unmerged checkpoints, 42
trials, 100 items a task, float32, two engines. One run is left in peace. Then, at moments drawn by the seed:

- drivers: `simmerge labels make` is killed, every second time after its first label of that start, else at any time;
  then the same command again, until the grid is done and a new one begins;
- actors: a process that holds an engine is killed, at most one before the next label comes;
- nodes: on a cluster of a head and two worker nodes (`ray.cluster_utils.Cluster`) a node is lost, and another joins.

After each finished grid the table of `LabelStore.read()` (key, items) must equal the quiet run's exactly, no key may be
there twice, and `LabelStore.check` must find no problem. No process may be left. Only processes that this script has
started are killed, by their ids. Prints what was killed when; exit code 1 if anything differs.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks import processes
from benchmarks.measuring import markdown, write_result
from benchmarks.search.setting import make_private, parser_of

CHECKPOINTS = ("math-strong", "math-weak", "code-strong", "multilingual-strong", "rag-weak")
NUM_ITEMS = 100
ACTOR = "ray::ResourceTrainable"  # what Ray Tune makes of `MergeTrial`
_POLL = 0.1
_PATIENCE = 600.0
Kill = Callable[[subprocess.Popen[str]], bool]  # whether there was something to kill


class Campaign:
    """One kind of kill after the other, each on label stores of its own."""

    def __init__(self, run: Path, scratch: Path, generator: random.Random, evaluator: str) -> None:
        self.generator, self._scratch = generator, scratch
        zoo = run.resolve() / "zoo"
        known = yaml.safe_load((zoo / "catalogue.yaml").read_text())
        chosen = [one for one in [known["base"], *known["checkpoints"]] if one["id"] in ("base", *CHECKPOINTS)]
        for one in chosen:
            one["path"] = str(zoo / one["path"])
        catalogue = scratch / "catalogue.yaml"
        catalogue.write_text(yaml.safe_dump({"base": chosen[0], "checkpoints": chosen[1:]}))
        self._command = ["-m", "simmerge_ray.cli.app", "labels", "make", catalogue, "--tasks", zoo / "tasks"]
        self._command += ["--max-items", NUM_ITEMS, "--evaluator", evaluator, "--log", scratch / "search.log"]
        self._num_stores = 0
        self.family: set[psutil.Process] = set()
        self.rows: list[list[Any]] = []
        self.expected: dict[str, Any] | None = None
        self.problems: list[str] = []
        self._began = time.monotonic()

    def new_store(self) -> Path:
        self._num_stores += 1
        return self._scratch / f"labels-{self._num_stores}"

    def start(self, labels: Path) -> subprocess.Popen[str]:
        return processes.start(*self._command, "--out", labels)

    def look(self, process: subprocess.Popen[str]) -> list[psutil.Process]:
        """The processes that it has started; remembered, to be looked for at the end."""
        found = processes.family_of(process)
        self.family.update(found)
        return found

    def wait(self, process: subprocess.Popen[str], seconds: float, labels: Path | None = None, more: int = 0) -> bool:
        """Until the time is over, or there are more label files than `more`; False if the process ended before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not (labels and num_files(labels) > more):
            if process.poll() is not None:
                return False
            self.look(process)
            time.sleep(_POLL)
        return process.poll() is None

    def finish(self, process: subprocess.Popen[str], labels: Path, what: str) -> None:
        """Wait for the end of a search that nobody disturbs any more, and compare its labels."""
        if self.wait(process, _PATIENCE):
            process.kill()
            raise SystemExit(f"{what}: the search did not end in {_PATIENCE:.0f} s")
        output = process.communicate()[0]
        if process.returncode != 0:
            self.problems.append(f"{what}: exit code {process.returncode}: {output[-2000:]}")
        self.compare(labels, what)

    def note(self, what: str, after: float, labels: Path) -> None:
        number = 1 + sum(row[0] != "" for row in self.rows)
        self.rows.append([number, what, f"{after:.1f}", num_files(labels), labels.name])
        print(f"{time.monotonic() - self._began:.0f} s: {what} after {after:.1f} s", file=sys.stderr, flush=True)

    def compare(self, labels: Path, what: str) -> None:
        from simmerge_ray.search.labels import Infeasible, LabelStore

        store = LabelStore(labels)
        found = store.read()
        plain = {
            one.key: one.outcome if isinstance(one.outcome, Infeasible) else one.outcome.items.tolist() for one in found
        }
        report = store.check()
        problems = list(report.problems)
        if len(plain) != len(found):
            problems.append(f"{len(found) - len(plain)} keys twice")
        if self.expected is None:
            self.expected = plain
        elif plain != self.expected:
            differing = sum(plain.get(key) != value for key, value in self.expected.items())
            problems.append(f"{differing} of {len(self.expected)} labels differ, {len(plain)} are there")
        self.problems += [f"{what}, {labels.name}: {problem}" for problem in problems]
        print(f"{what}: {'; '.join(problems) or 'the same labels'}", file=sys.stderr, flush=True)
        evaluated = f"{report.num_labels} labels, {report.num_duplicates} rows twice"
        self.rows.append(["", f"{what}: grid finished", "", "same" if not problems else "; ".join(problems), evaluated])

    def kill_drivers(self, count: int, whole: float, trials: float) -> None:
        """whole: seconds of the quiet run. trials: of its part from the first label to the last."""
        while count:
            labels, ended = self.new_store(), False
            while count and not ended:
                before, started = num_files(labels), time.monotonic()
                process = self.start(labels)
                if count % 2:
                    self.wait(process, _PATIENCE, labels, before)
                ended = not self.wait(process, self.generator.uniform(0, trials if count % 2 else whole))
                if ended:
                    self.finish(process, labels, "driver")
                    continue
                _, family = processes.interrupt(process, signal.SIGKILL)
                self.family.update(family)
                self.note("driver killed", time.monotonic() - started, labels)
                count -= 1
            if not ended:
                self.finish(self.start(labels), labels, "driver")

    def disturb(self, process: subprocess.Popen[str], labels: Path, count: int, what: str, kill: Kill) -> int:
        """Kill now and then, at most once before the next label comes, until the search ends; how many are left."""
        before, started = 0, time.monotonic()
        while count and self.wait(process, _PATIENCE, labels, before):
            if not self.wait(process, self.generator.uniform(0, 4)):
                break
            before = num_files(labels)
            if kill(process):
                self.note(what, time.monotonic() - started, labels)
                count -= 1
        return count

    def kill_actors(self, count: int) -> None:
        def kill(process: subprocess.Popen[str]) -> bool:
            actors = {one.pid: one for one in self.look(process) if processes.is_one_of(one, [ACTOR])}
            if actors:
                actors[self.generator.choice(sorted(actors))].kill()
            return bool(actors)

        while count:
            labels = self.new_store()
            process = self.start(labels)
            count = self.disturb(process, labels, count, "actor killed", kill)
            self.finish(process, labels, "actor")

    def lose_nodes(self, count: int) -> None:
        os.environ.update(RAY_health_check_period_ms="500", RAY_health_check_failure_threshold="4")
        from ray.cluster_utils import Cluster

        cluster = Cluster(True, False, head_node_args={"num_cpus": 0, "include_dashboard": False})
        os.environ["RAY_ADDRESS"] = cluster.address
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]

        def lose(_: subprocess.Popen[str]) -> bool:
            self.family.update(psutil.Process().children(recursive=True))
            cluster.remove_node(nodes.pop(self.generator.randrange(2)), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1))
            return True

        try:
            while count:
                labels, started = self.new_store(), time.monotonic()
                process = self.start(labels)
                count = self.disturb(process, labels, count, "node lost", lose)
                for _ in range(5):  # a driver that the losses have ended is started again, like by its user
                    if self.wait(process, _PATIENCE) or process.returncode == 0:
                        break
                    process.communicate()
                    self.note(f"driver ended with {process.returncode}; again", time.monotonic() - started, labels)
                    process = self.start(labels)
                self.finish(process, labels, "node")
        finally:
            self.family.update(psutil.Process().children(recursive=True))
            del os.environ["RAY_ADDRESS"]
            cluster.shutdown()


def num_files(labels: Path) -> int:
    return sum(1 for _ in labels.glob("*.parquet"))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    for name, count in (("drivers", 10), ("actors", 10), ("nodes", 3)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--evaluator", default="vllm")
    arguments = parser.parse_args()
    make_private()
    with tempfile.TemporaryDirectory(prefix="simmerge-soak-search-") as scratch:
        campaign = Campaign(arguments.run, Path(scratch), random.Random(arguments.seed), arguments.evaluator)
        labels, started = campaign.new_store(), time.monotonic()
        process = campaign.start(labels)
        campaign.wait(process, _PATIENCE, labels)
        first = time.monotonic()
        campaign.finish(process, labels, "undisturbed")
        whole, trials = time.monotonic() - started, time.monotonic() - first
        campaign.kill_drivers(arguments.drivers, whole, trials)
        campaign.kill_actors(arguments.actors)
        if arguments.nodes:
            campaign.lose_nodes(arguments.nodes)
        started = time.monotonic()
        processes.assert_gone(campaign.family, 60)
        gone = time.monotonic() - started
    num_labels = len(campaign.expected or ())
    print(f"undisturbed {whole:.0f} s, {trials:.0f} s of it from the first label on, {num_labels} labels")
    print(markdown(("number", "what", "after (s)", "label files then", "store"), campaign.rows))
    print(f"\n{len(campaign.family)} processes were started, all gone {gone:.0f} s after the last search")
    print("the same labels as undisturbed" if not campaign.problems else "\n".join(["DIFFERENT", *campaign.problems]))
    result = {"rows": campaign.rows, "problems": campaign.problems, "whole_s": whole, "trials_s": trials}
    write_result(arguments.out / "soak_search.json", result)
    if campaign.problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
