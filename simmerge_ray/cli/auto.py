"""`simmerge auto`: from a catalogue to the best of the merges that are predicted to be good, or to "keep this one"."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simmerge_ray.base.config import EngineConfig, RankingConfig, RankingFiles, SearchConfig
from simmerge_ray.base.errors import TaskError
from simmerge_ray.base.storage import Manifest, Place, digest_file, local_directory
from simmerge_ray.cli.options import DEFAULT_LOG, LogOption, with_config_options
from simmerge_ray.cli.places import PathOrUri, place_argument, place_option

if TYPE_CHECKING:
    from rich.table import Table

    from simmerge_ray.base.progress import Narrator
    from simmerge_ray.pipelines.auto import Answer, AutoRun
    from simmerge_ray.plans.plan import MergePlan
    from simmerge_ray.search.setup import PreparedSearch
    from simmerge_ray.search.winner import ObjectiveEstimate, Verdict
    from simmerge_ray.selector.planning.scorer import Ranking


@with_config_options
def auto(
    catalogue: Annotated[PathOrUri, place_argument(help="catalogue YAML: base and checkpoints")],
    task_files: Annotated[
        PathOrUri, place_option("--tasks", help="directory of <task>.jsonl with prompt and target per line")
    ],
    out: Annotated[Path, typer.Option(help="directory for labels, plans, the answer and the merge")],
    files: RankingFiles,
    config: RankingConfig,
    engine: EngineConfig,
    evaluate: Annotated[int, typer.Option(min=1, help="merges to measure, those predicted to be best")] = 5,
    write: Annotated[bool, typer.Option(help="write a merge that is the answer to OUT/merged")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="rank, say what would be measured, and stop")] = False,
    log: LogOption = DEFAULT_LOG,
) -> None:
    """Rank the merges of a catalogue, measure the first few beside the checkpoints, and make the best, if it is better.

    An interrupted run goes on with the same command.
    """
    started = time.monotonic()
    search = SearchConfig(**engine.model_dump(), pairs="all")
    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.search.evaluation import load_tasks
    from simmerge_ray.selector.planning.request import on_fixed_tasks, read_sources

    checkpoints = load_catalogue(catalogue)
    known = load_tasks(task_files)
    sources = read_sources(files, checkpoints, config.propagator)
    request = sources.request(on_fixed_tasks(config, checkpoints))
    for name in request.pool.tasks:
        if name not in known:
            raise TaskError(
                f"{task_files} has no {name}.jsonl, which says what is measured on {name!r}; "
                f"known: {', '.join(sorted(known))}"
            )
    tasks = {name: known[name].sampled(search.max_items, search.seed) for name in request.pool.tasks}
    from simmerge_ray.base.progress import narrated

    with narrated(log) as narrator:
        from simmerge_ray.pipelines.auto import AutoRun, check_auto
        from simmerge_ray.pipelines.dataset import input_digests
        from simmerge_ray.selector.planning.files import default_selector

        run = AutoRun(checkpoints, tasks, request.pool.objective, search, out, write)
        study = check_auto(run)
        with narrator.stage("rank") as stage:
            ranking = request.rank(evaluate).with_best_fixed()
            stage.result = f"{ranking.num_scored} merges scored, {len(ranking.plans)} to be measured"
        if dry_run:
            narrator.print_lines(dry_run_lines(study, ranking, checkpoints.own_task, out))
            return
        inputs = input_digests(checkpoints, tasks) | {"signals": digest_file(files.signals)}
        inputs |= _digests_of(files.selector or default_selector())
        options = {"ranking": config.model_dump(mode="json") | {"evaluate": evaluate}, "search": search.content()}
        answer_stages(run, ranking, narrator, Manifest("auto", options, inputs), started)


def answer_stages(run: AutoRun, ranking: Ranking, narrator: Narrator, manifest: Manifest, started: float) -> None:
    """Measure, show the answer, and write it. started: `time.monotonic()` of the whole run."""
    from simmerge_ray.pipelines.auto import measure_stage, write_stage

    answer = measure_stage(run, ranking, narrator)
    narrator.console.print(answer_table(run, answer))
    narrator.print_lines(extrapolation_lines(ranking, run.catalogue.own_task, list(run.tasks)) + answer_lines(answer))
    write_stage(run, answer, manifest, started, narrator)


def _digests_of(selector: Place) -> dict[str, str]:
    """Digests of a selector's files, by what a manifest calls them."""
    with local_directory(selector) as directory:
        artifacts = sorted(directory.rglob("*.safetensors"))
        return {f"selector {path.relative_to(directory)}": digest_file(path) for path in artifacts}


def dry_run_lines(study: PreparedSearch, ranking: Ranking, own_task: Mapping[str, str | None], out: Path) -> list[str]:
    """What would be measured, and what it would take."""
    from simmerge_ray.pipelines.auto import cost_lines, single_plans
    from simmerge_ray.plans.plan import fold_text

    shown = [f"{fold_text(one.plan)}  (predicted {one.utility:.3f})" for one in ranking.plans]
    plans = [f"  {number}. {text}" for number, text in enumerate(shown, 1)]
    singles = [plan.label for plan in single_plans(ranking, study.catalogue)]
    return [
        f"merges   {len(plans)}, measured in memory:",
        *plans,
        *extrapolation_lines(ranking, own_task, list(study.tasks)),
        f"beside   {', '.join(singles)}",
        f"tasks    {', '.join(f'{name} ({task.num_items} items)' for name, task in study.tasks.items())}",
        *cost_lines(study, ranking),
        f"out      {out}",
    ]


def extrapolation_lines(ranking: Ranking, own_task: Mapping[str, str | None], tasks: Sequence[str]) -> list[str]:
    """A warning if plans have no member of the tasks that count: selectors learn from pairs on their own tasks."""
    strangers = [one for one in ranking.plans if not any(own_task.get(name) in tasks for name in one.plan.members)]
    if not strangers or not any(own_task.values()):
        return []
    return [
        f"{len(strangers)} of the {len(ranking.plans)} merges have no member that was fine-tuned for "
        f"{' or '.join(tasks)}; what is predicted of them is extrapolated (--exclude leaves checkpoints out)"
    ]


def answer_table(run: AutoRun, answer: Answer) -> Table:
    """Merges and checkpoints, the best of the choosing half first; `*` marks the answer."""
    from rich.markup import escape
    from rich.table import Table

    from simmerge_ray.search.winner import objective_estimate

    table = Table(title=f"utility, {_objective_text(run)}", title_justify="left")
    table.add_column("")
    table.add_column("plan or checkpoint", overflow="fold", min_width=16)
    for column in ("predicted", "interval", "chosen by", "measured", "se", *run.tasks):
        table.add_column(column, justify="right", no_wrap=column == "interval")
    for line in answer.lines:
        mark = "*" if line.plan.id == answer.verdict.winner.plan.id else ""
        row, predicted, measured = [mark, escape(_text(line.plan))], line.predicted, line.measured
        row += [f"{predicted.utility:.3f}", "{:.2f}-{:.2f}".format(*predicted.interval)] if predicted else ["", ""]
        if measured is None:
            table.add_row(*row, "", "failed", "", *[""] * len(run.tasks))
            continue
        utility = objective_estimate(measured.reporting, run.objective)
        chosen_by = objective_estimate(measured.choosing, run.objective)
        by_task = [f"{measured.reporting[task].mean():.3f}" for task in run.tasks]
        table.add_row(*row, f"{chosen_by.value:.3f}", f"{utility.value:.3f}", f"{utility.se:.3f}", *by_task)
    return table


def _text(plan: MergePlan) -> str:
    from simmerge_ray.plans.plan import fold_text

    return fold_text(plan) if plan.steps else plan.label


def _objective_text(run: AutoRun) -> str:
    tasks, name = list(run.tasks), run.objective.name
    if run.objective.weights:
        return name
    return tasks[0] if len(tasks) == 1 else f"{name} of {', '.join(tasks)}"


def answer_lines(answer: Answer) -> list[str]:
    """The answer in words, and by how much."""
    verdict = answer.verdict
    winner = _text(verdict.winner.plan)
    sizes = [len(items) for items in verdict.winner.reporting.values()]
    said = [
        "chosen by: half of the items; measured, se and tasks: the other half, which had no part in the choice; "
        "interval: 95 % of the spread of the selector's ensemble"
    ]
    said += [f"not measured: {_text(line.plan)}: {line.reason}" for line in answer.lines if line.measured is None]
    on = "-".join(map(str, sorted({min(sizes), max(sizes)})))
    utility = f"{verdict.utility.value:.3f} ± {verdict.utility.se:.3f} on {on} items of each task"
    if verdict.best_merge is None:
        said.append(f"answer: keep {winner}, {utility}: no merge could be measured")
    elif verdict.best_single is None:
        said.append(f"answer: merge {winner}, {utility}; no checkpoint could be measured beside it")
    elif verdict.keeps_checkpoint:
        said.append(f"answer: keep {winner}, {utility}: no measured merge beats it")
        said.append(f"the best merge, {_text(verdict.best_merge.plan)}, against it: {_advantage_text(verdict)}")
    else:
        said.append(f"answer: merge {winner}, {utility}")
        said.append(f"against the best checkpoint, {verdict.best_single.plan.label}: {_advantage_text(verdict)}")
    return said


def _advantage_text(verdict: Verdict) -> str:
    assert verdict.advantage is not None and verdict.chosen_by is not None
    text = f"{_signed(verdict.advantage)} ({_signed(verdict.chosen_by)} on the half that chose), "
    within = "within two paired standard errors: these items do not tell the two apart"
    text += "more than two paired standard errors" if verdict.advantage.is_clear else within
    disagree = verdict.advantage.value * verdict.chosen_by.value < 0
    return text + ("; the halves disagree which is better, so take more items" if disagree else "")


def _signed(difference: ObjectiveEstimate) -> str:
    return f"{difference.value:+.3f} ± {difference.se:.3f}"
