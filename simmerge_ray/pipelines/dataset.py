"""The search as a stage of a run: reads files, writes labels, what was found, and a manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.markup import escape

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import ConfigError, InputError, TaskError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import Manifest, Place, read_json, write_json
from simmerge_ray.base.tables import TextTable, columns_of
from simmerge_ray.capacity.engines import engines_that_fit, waiting_lines
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue, twins
from simmerge_ray.checkpoints.probes import ProbeSet, load_probe_sets
from simmerge_ray.on_ray.digests import digest_on_nodes
from simmerge_ray.on_ray.resources import memory_for_workers
from simmerge_ray.plans.operators.specs import parse_arms
from simmerge_ray.plans.plan import resolve_plan, write_plan
from simmerge_ray.reports.found import write_search_report
from simmerge_ray.search.estimate import SearchEstimate, estimate_search
from simmerge_ray.search.evaluation import EvaluationTask, load_tasks
from simmerge_ray.search.headroom import headroom
from simmerge_ray.search.labels import LabelStore, pair_contexts
from simmerge_ray.search.setup import PreparedSearch, prepare_search
from simmerge_ray.search.status import SearchStatus, cause
from simmerge_ray.search.summary import ComparedMerges, PlanResult, comparisons, ranked_results

UNCHANGED = "unchanged since the last run"
_RESULTS = "_search"  # in a label store; readers of Parquet directories skip names with an underscore
_NUM_SHOWN = 10


def load_search_tasks(tasks_dir: Place | None, config: SearchConfig) -> dict[str, EvaluationTask]:
    """The task files of a directory and the config's tasks of lm-evaluation-harness, items sampled as it says;
    TaskError with every problem of all of them, or if there is no task at all."""
    tasks: dict[str, EvaluationTask] = {}
    problems = []
    if tasks_dir is not None:
        try:
            for name, task in load_tasks(tasks_dir).items():
                tasks[name] = task.sampled(config.max_items, config.seed)
        except TaskError as error:
            problems.append(str(error))
    if config.lm_eval:
        from simmerge_ray.search.evaluation.harness import load_harness_tasks

        try:
            harness = load_harness_tasks(
                config.lm_eval,
                include_path=config.lm_eval_include,
                num_fewshot=config.lm_eval_fewshot,
                max_items=config.max_items,
                seed=config.seed,
            )
            problems += [f"task {name!r} is a file and a task of lm-eval" for name in harness.keys() & tasks.keys()]
            tasks |= harness
        except TaskError as error:
            problems.append(str(error))
    if problems:
        raise TaskError("\n".join(problems))
    if not tasks:
        raise TaskError("no tasks: name a directory of <task>.jsonl files, or tasks of lm-eval")
    return tasks


def search_stage(
    catalogue_path: Place,
    tasks_dir: Place | None,
    labels: Place,
    config: SearchConfig,
    narrator: Narrator,
    probes: Place | None = None,
) -> dict[str, Any]:
    """Labels that are missing, into the store `labels`, and into its directory `_search` the manifest `search.json`
    and what was found: `best.json`, the best merge as a plan file, and of pairs x arms `headroom.json`. With `probes`
    the store gets what every merge keeps of its members' answers as well. Returns what `best.json` holds. InputError:
    whatever cannot be used, before Ray is started. EngineError: the evaluator did not start."""
    catalogue = load_catalogue(catalogue_path)
    tasks = load_search_tasks(tasks_dir, config)
    probe_sets, answers = _answered_probes(catalogue, probes), {}
    if probe_sets:
        from simmerge_ray.pipelines.predictor import answers_stage

        digest_on_nodes(catalogue)
        answers = answers_stage(catalogue, probe_sets, labels, config, narrator)
    with narrator.stage("search") as stage:
        digest_on_nodes(catalogue)
        say_twins(catalogue, narrator)
        inputs = input_digests(catalogue, tasks)
        inputs |= {one.name: one.digest for some in answers.values() for one in some}
        manifest = Manifest("search", config.content(), inputs)
        results_dir = labels / _RESULTS
        if manifest.is_current(results_dir / "search.json") and (results_dir / "best.json").exists():
            stage.result = UNCHANGED
            found: dict[str, Any] = read_json(results_dir / "best.json")
            return found
        from simmerge_ray.on_ray.merge_search import run_search

        started = time.monotonic()
        if config.evaluator == "transformers":
            narrator.print_lines(waiting_lines(prepare_search(catalogue, tasks, config, str(labels.resolve()))))
        with search_bar(narrator) as report:
            # Absolute: trial actors write the labels, and may run in another working directory.
            result = run_search(catalogue, tasks, config, labels.resolve(), report=report, answers=answers)
        for name, reason in sorted(result.infeasible.items()):
            narrator.print_lines([f"           infeasible: {name}: {reason}"])
        if config.budget is None:
            write_headroom(labels, [arm.label for arm in parse_arms(config.arms)], results_dir / "headroom.json")
        found = write_best(result.search, results_dir, narrator)
        left = f", {result.num_left} not run (limit reached; run the same command again to go on)"
        if not result.num_left:
            left, counts = "", {"num_labels": result.num_labels, "num_infeasible": len(result.infeasible)}
            manifest.write(results_dir / "search.json", time.monotonic() - started, counts)
        stage.result = (
            f"{result.num_trials_run} trials run{left}, {result.num_labels} labels "
            f"({len(result.infeasible)} infeasible) by {config.evaluator} -> {labels}"
        )
        return found


def _answered_probes(catalogue: Catalogue, probes: Place | None) -> dict[str, ProbeSet]:
    """Probes of the members' own tasks. Raises ConfigError, ProbeError: see `check_owners`."""
    if probes is None:
        return {}
    from simmerge_ray.signals.candidates.signatures import check_owners

    probe_sets = load_probe_sets(probes)
    check_owners(catalogue, probe_sets)
    return {task: probe_sets[task] for task in sorted({task for task in catalogue.own_task.values() if task})}


def say_twins(catalogue: Catalogue, narrator: Narrator) -> None:
    """A warning for each checkpoint that is a copy of another one."""
    for line in twins(catalogue):
        narrator.say(f"[yellow]{escape(line)}[/yellow]")


def input_digests(catalogue: Catalogue, tasks: Mapping[str, EvaluationTask]) -> dict[str, str]:
    """Digests of all checkpoints and tasks, by what a manifest calls them."""
    inputs = {f"checkpoint {name}": digest for name, digest in catalogue.digests().items()}
    return inputs | {f"task {name}": task.digest for name, task in tasks.items()}


@contextmanager
def search_bar(narrator: Narrator) -> Iterator[Callable[[SearchStatus], None]]:
    """A progress bar for a search; the first trial that fails for a reason is said at once, and why."""
    said: set[str] = set()
    with narrator.status_bar("merges evaluated") as report:

        def tell(status: SearchStatus) -> None:
            for how, some in (("failed", status.failures), ("trying again", status.setbacks)):
                for label, reason in some:
                    if (line := f"{how}: {cause(label, reason)}") not in said:
                        said.add(line)
                        narrator.print_lines([f"           {how}: {label}: {reason}"])
            report(status.done, status.total, status.line)

        yield tell


def write_headroom(labels: Place, arms: Sequence[str], out: Place) -> None:
    """Headroom report of a label store as JSON; where GapClosed is nowhere defined, the reason instead."""
    contexts = pair_contexts(LabelStore(labels).read(), arms)
    try:
        content = headroom(contexts).to_json()
    except InputError as error:
        content = {"undefined": str(error)}
    write_json(out, content)


def write_best(study: PreparedSearch, out: Place, narrator: Narrator) -> dict[str, Any]:
    """What to do, `best.json`, the best merge's plan file, and a table of the best merges and checkpoints; the content
    of `best.json`. Merges, checkpoints and the base are compared on the same tasks."""
    merges, singles = ranked_results(study)
    compared = comparisons(study, merges, singles)
    content = {
        "verdicts": [_verdict_json(one) for one in compared],
        "merges": [_row(one) for one in merges],
        "singles": [_row(one) for one in singles],
    }
    write_json(out / "best.json", content)
    report = write_search_report(content, out)
    for one in compared:
        if one.verdict is not None:
            narrator.print_lines([f"{one.objective.name} of {', '.join(one.tasks)}:", *one.verdict.lines()])
            narrator.table(_table(one, merges, singles))
    if study.space is not None:
        for number, best in enumerate([one for one in merges if one.best], 1):
            name = "best.plan.json" if len(study.objectives) == 1 else f"front-{number}.plan.json"
            measured = {task: {"measured": utility, "se": se} for task, (utility, se) in best.utilities.items()}
            write_plan(out / name, resolve_plan(best.plan, study.catalogue), measured)
            if number == 1:
                narrator.print_lines([f"make the best merge with: simmerge merge {out / name} OUT"])
    narrator.print_lines([f"report: {report.with_suffix('.html')}"])
    return content


def _verdict_json(one: ComparedMerges) -> dict[str, Any]:
    told = {"tasks": list(one.tasks), "objective": one.objective.name}
    if one.verdict is None:
        return told | {"answer": None}
    verdict = one.verdict
    return told | {
        "answer": verdict.answer,
        "winner": verdict.winner.plan.label,
        "lines": verdict.lines(),
        "utility": asdict(verdict.utility),
        "best_merge": verdict.best_merge.plan.label if verdict.best_merge else None,
        "best_single": verdict.best_single.plan.label if verdict.best_single else None,
        "merge_minus_single": asdict(verdict.advantage) if verdict.advantage else None,
    }


def _row(one: PlanResult) -> dict[str, Any]:
    utilities = {task: {"utility": utility, "se": se} for task, (utility, se) in one.utilities.items()}
    plan = {"label": one.plan.label, "plan": one.plan.to_json()}
    return plan | {"objectives": list(one.values), "utilities": utilities, "best": one.best}


def _table(compared: ComparedMerges, merges: Sequence[PlanResult], singles: Sequence[PlanResult]) -> TextTable:
    """The best merges, and below them the checkpoints as they are, the base among them, all on the same tasks; `*` is
    the answer."""
    tasks, objective = compared.tasks, compared.objective
    rows = []
    for kind, most in ((merges, _NUM_SHOWN), (singles, None)):
        same = [one for one in kind if set(tasks) <= set(one.utilities)]
        values = {one.plan.id: objective.value({task: one.utilities[task][0] for task in tasks}) for one in same}
        for one in sorted(same, key=lambda one: -values[one.plan.id])[:most]:
            mark = "*" if compared.verdict and one.plan.id == compared.verdict.winner.plan.id else ""
            by_task = ["{:.3f} ± {:.3f}".format(*one.utilities[task]) for task in tasks]
            rows.append([mark, one.plan.label, f"{values[one.plan.id]:.3f}", *by_task])
    columns = columns_of(["", "merge or checkpoint"], [objective.name, *tasks])
    return TextTable("measured on all items, merges, then checkpoints as they are", columns, rows)


def plan_search(catalogue_path: Place, tasks_dir: Place | None, labels: Place, config: SearchConfig) -> SearchEstimate:
    """Check everything that `search_stage` checks before Ray starts (ConfigError with all problems); what it would
    take. Reads every checkpoint once."""
    problems: list[str] = []
    catalogue = tasks = None
    try:
        catalogue = load_catalogue(catalogue_path)
    except InputError as error:
        problems.append(str(error))
    try:
        tasks = load_search_tasks(tasks_dir, config)
    except InputError as error:
        problems.append(str(error))
    if catalogue is None or tasks is None:
        raise ConfigError("\n".join(problems))
    from simmerge_ray.search.proposers import make_proposer

    study = prepare_search(catalogue, tasks, config, str(labels.resolve()))
    return estimate_search(study, make_proposer(study).total, engines_that_fit(study, local_resources()))


def local_resources() -> dict[str, float]:
    """What Ray would count on this machine."""
    import torch

    memory = float(memory_for_workers())
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count()), "memory": memory}
