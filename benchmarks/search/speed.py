"""Seconds of a trial: weights swapped into a live engine, against an engine started for each merge, and the floor.

`python -m benchmarks.search.speed --run RUN --out DIR [--fixtures DIR] [--parts zoo,large,tune]`, where RUN is a
finished demo run and FIXTURES the directory of `benchmarks.merge.fixtures` (SmolLM2-135M, and the noisy copies that
`benchmarks.signals.cost` makes of it). float32, one thread; every pair of the zoo of two tasks is evaluated on 32 items
of each, 64 short generations.

- zoo: one process. First a live engine: trials of different merges as a search runs them (`TrialRunner.run`: merge,
  swap, generate, write the label), after some that are not counted. After each, the same 64 answers once more with the
  weights as they are: the floor. Then, for merges that the live engine has evaluated, the merge is written to disk and
  a new engine started on it, in this process (after one that is not counted) and in a process of its own. Their answers
  must have the same utilities, item by item. At the end the live engine again.
- large: trial and floor, alternating, on SmolLM2-135M and noisy copies (64 chats, answers of at most 8 and 16 tokens).
- tune: `run_search` with one engine; a whole trial is the time from label file to label file. The step is the
  same trials in this process afterwards, without Ray: seconds in labels also hold what Tune takes before a step.

Figures are medians.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measuring import markdown, timed, write_result
from benchmarks.search.setting import make_private, parser_of

ITEMS = 32  # of each of two tasks
ARMS = ("linear", "nuslerp", "task_arithmetic", "ties(density=0.2)")
WARM_UP = 4


def zoo_study(run: Path, labels: Path, arms: tuple[str, ...] = ARMS) -> Any:
    from simmerge_ray.base.config import SearchConfig
    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.pipelines.dataset import load_search_tasks
    from simmerge_ray.search.setup import prepare_search

    config = SearchConfig(arms=arms, max_items=ITEMS)
    tasks = load_search_tasks(run / "zoo" / "tasks", config)
    return prepare_search(load_catalogue(run / "zoo" / "catalogue.yaml"), tasks, config, str(labels))


def merges(study: Any) -> list[Any]:
    """Its trials that merge a pair, in an order that mixes pairs and arms."""
    from simmerge_ray.search.setup import grid_trials

    found = [trial for trial in grid_trials(study) if trial.plan.steps]
    return [found[(number * 37) % len(found)] for number in range(len(found))]


def evaluate(study: Any, trial: Any, evaluator: Any) -> dict[str, list[float]]:
    return {task: study.tasks[task].evaluate(evaluator).tolist() for task in trial.tasks}


class Live:
    """A live engine under a `TrialRunner`; keeps what its evaluator is."""

    def __init__(self, study: Any) -> None:
        from simmerge_ray.on_ray.engines import start_evaluator
        from simmerge_ray.search.runner import TrialRunner

        def start(study: Any) -> Any:
            self.evaluator = start_evaluator(study)
            return self.evaluator

        self.study, self.runner = study, TrialRunner(study, start)

    def pairs(self, trials: list[Any]) -> tuple[list[float], list[float], list[dict[str, list[float]]]]:
        """Seconds of every trial, of the same generations without a merge, and the utilities; alternating."""
        steps, floors, utilities = [], [], []
        for trial in trials:
            progress, step = timed(lambda trial=trial: self.runner.run(trial))
            assert progress.finished and progress.infeasible is None, progress.infeasible
            again, floor = timed(lambda trial=trial: evaluate(self.study, trial, self.evaluator))
            assert again == {task: items.tolist() for task, items in progress.items.items()}
            steps.append(step.wall)
            floors.append(floor.wall)
            utilities.append(again)
        return steps, floors, utilities


def merged_on_disk(run: Path, plan: Any) -> dict[str, list[float]]:
    """The way without a live engine: write the merge, start an engine on it, evaluate, end it, delete the merge."""
    from simmerge_ray.base.config import SearchConfig
    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.checkpoints.references import CheckpointRef
    from simmerge_ray.merging.write.directory import write_merge
    from simmerge_ray.on_ray.vllm_evaluator import VllmEvaluator
    from simmerge_ray.pipelines.dataset import load_search_tasks
    from simmerge_ray.plans.plan import plan_from_json, resolve_plan

    catalogue = load_catalogue(run / "zoo" / "catalogue.yaml")
    tasks = load_search_tasks(run / "zoo" / "tasks", SearchConfig(max_items=ITEMS))
    plan = plan_from_json(plan)
    with tempfile.TemporaryDirectory(prefix="simmerge-merged-") as scratch:
        out = Path(scratch, "merged")
        write_merge(resolve_plan(plan, catalogue), out)
        engine = VllmEvaluator(CheckpointRef("merged", out), "float32", 128)
        names = sorted({catalogue.own_task[member] for member in plan.members})
        found = {name: tasks[name].evaluate(engine).tolist() for name in names}
        engine.close()
    return found


def in_new_process(run: Path, plan: Any) -> dict[str, list[float]]:
    command = [sys.executable, "-m", "benchmarks.search.speed", "--run", str(run), "--out", "-"]
    answer = subprocess.run([*command, "--plan", json.dumps(plan)], capture_output=True, text=True, check=True).stdout
    return json.loads(answer.splitlines()[-1])


def zoo(run: Path, num_live: int, num_same: int, num_new: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="simmerge-speed-") as scratch:
        study = zoo_study(run, Path(scratch, "labels"))
        trials = merges(study)
        live = Live(study)
        live.pairs(trials[:WARM_UP])
        chosen = trials[WARM_UP : WARM_UP + num_live]
        steps, floors, utilities = live.pairs(chosen)
        live.runner.close()
        sides: dict[str, list[float]] = {"same process": [], "new process": []}
        merged_on_disk(run, trials[0].plan.to_json())
        for name, count, way in (("same process", num_same, merged_on_disk), ("new process", num_new, in_new_process)):
            for number in range(count):
                found, seconds = timed(lambda number=number, way=way: way(run, chosen[number].plan.to_json()))
                assert found == utilities[number], f"{name}, {chosen[number].plan.label}: other utilities"
                sides[name].append(seconds.wall)
        live = Live(study)
        later = trials[WARM_UP + num_live :]
        live.pairs(later[:WARM_UP])
        again, _, _ = live.pairs(later[WARM_UP : WARM_UP + num_live // 2])
        live.runner.close()
    return {"live": steps, "floor": floors, "live again": again} | sides


def large(fixtures: Path, num_trials: int, max_new_tokens: int) -> dict[str, Any]:
    from benchmarks.signals.cost import catalogue_of, copies
    from simmerge_ray.base.config import SearchConfig
    from simmerge_ray.search.evaluation import Task
    from simmerge_ray.search.evaluation.tasks import Item
    from simmerge_ray.search.setup import prepare_search

    base, checkpoints = copies(fixtures, 4)
    catalogue = catalogue_of(base, checkpoints)
    catalogue = replace(catalogue, own_task=dict.fromkeys(catalogue.own_task, "sums"))
    items = tuple(Item(f"What is {3 + i % 17} plus {2 + i // 3}?", str(5 + i % 17 + i // 3)) for i in range(2 * ITEMS))
    task = Task("sums", items, "contains", max_new_tokens, chat=True)
    with tempfile.TemporaryDirectory(prefix="simmerge-speed-") as scratch:
        config = SearchConfig(arms=("linear", "slerp", "ties"), pairs="all", max_model_len=128)
        study = prepare_search(catalogue, {"sums": task}, config, scratch)
        trials = merges(study)
        live = Live(study)
        live.pairs(trials[:2])
        chosen = trials[2 : 2 + num_trials]
        steps, floors, _ = live.pairs(chosen)
        live.runner.close()
    return {"live": steps, "floor": floors, "arms": [trial.plan.steps[0].arm.label for trial in chosen]}


def tune(run: Path, num_trials: int) -> dict[str, Any]:
    """Seconds from label file to label file of a search with one engine, and of the same trials in this process."""
    from simmerge_ray.on_ray.merge_search import run_search

    with tempfile.TemporaryDirectory(prefix="simmerge-speed-") as scratch:
        study = zoo_study(run, Path(scratch, "labels"))
        trials = merges(study)[:num_trials]
        config = study.config.model_copy(update={"concurrency": 1, "max_trials": num_trials})
        run_search(study.catalogue, study.tasks, config, Path(scratch, "labels"), [trial.plan for trial in trials])
        ends = sorted(path.stat().st_mtime_ns / 1e9 for path in Path(scratch, "labels").glob("*.parquet"))
        live = Live(zoo_study(run, Path(scratch, "again")))
        steps, _, _ = live.pairs(trials)
        live.runner.close()
    whole = [later - earlier for earlier, later in zip(ends, ends[1:], strict=False)]
    return {"whole": whole[WARM_UP - 1 :], "step": steps[WARM_UP:]}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--fixtures", type=Path, help="directory of benchmarks.merge.fixtures")
    parser.add_argument("--parts", default="zoo,large,tune")
    parser.add_argument("--counts", default="24,5,3,40,9", help="live, same process, new process, tune, large")
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    make_private()
    if arguments.plan:
        print(json.dumps(merged_on_disk(arguments.run, json.loads(arguments.plan))))
        return
    num_live, num_same, num_new, num_tune, num_large = map(int, arguments.counts.split(","))
    parts = arguments.parts.split(",")
    result: dict[str, Any] = {}
    rows: list[list[Any]] = []

    def add(what: str, seconds: list[float], ratio: str = "", asked: str = "") -> None:
        rows.append([what, len(seconds), median(seconds), ratio, asked])

    if "zoo" in parts:
        result["zoo"] = found = zoo(arguments.run, num_live, num_same, num_new)
        step = median(found["live"])
        add("trial with the live engine", found["live"])
        add("the same, at the end of the run", found["live again"])
        for name, asked in (("same process", 8), ("new process", 20)):
            add(f"a new engine, {name}", found[name], f"{median(found[name]) / step:.1f} x", f">= {asked} x")
        over = f"trial / floor {step / median(found['floor']):.2f}"
        add("generation alone (the floor)", found["floor"], over, "<= 1.5")
        write_result(arguments.out / "speed.json", result)
    for max_new_tokens in (8, 16) if "large" in parts else ():
        result[f"large {max_new_tokens}"] = found = large(arguments.fixtures, num_large, max_new_tokens)
        for arm in sorted(set(found["arms"])):
            own = [seconds for seconds, of in zip(found["live"], found["arms"], strict=True) if of == arm]
            add(f"SmolLM2-135M, {arm}, {max_new_tokens} tokens", own)
        over = f"trial / floor {median(found['live']) / median(found['floor']):.2f}"
        add("all of these", found["live"], over, "<= 2")
        add("their generation alone", found["floor"])
        write_result(arguments.out / "speed.json", result)
    if "tune" in parts:
        result["tune"] = found = tune(arguments.run, num_tune)
        more = median(found["whole"]) - median(found["step"])
        add("the same trials in this process", found["step"])
        add("whole trial, under Tune", found["whole"], f"+ {more:.2f} s", "<= + 0.35 s")
    write_result(arguments.out / "speed.json", result)
    print(markdown(("what", "n", "s (median)", "ratio", "asked"), rows))


if __name__ == "__main__":
    main()
