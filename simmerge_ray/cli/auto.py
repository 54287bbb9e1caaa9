"""`simmerge auto`: from a catalogue and probes to the merge that keeps most of its members, or to "keep this one".

`jobs/find_merge.py` is the same command as a job.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simmerge_ray.base.config import EngineConfig, SearchConfig
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.base.storage import Manifest, check_outputs
from simmerge_ray.cli.job_line import with_job_line
from simmerge_ray.cli.options import DEFAULT_LOG, LogOption, with_config_options
from simmerge_ray.cli.places import CatalogueArgument, PathOrUri, path_option, place_option

if TYPE_CHECKING:
    from rich.table import Table

    from simmerge_ray.pipelines.auto.measure import Measurement
    from simmerge_ray.pipelines.auto.request import AutoRun, LabelFree
    from simmerge_ray.plans.plan import MergePlan
    from simmerge_ray.search.winner import ObjectiveEstimate, Verdict


@with_job_line("find_merge", "out", "signatures")
@with_config_options
def auto(
    catalogue: CatalogueArgument,
    probes: Annotated[PathOrUri, place_option(help="directory of <task>.jsonl, a `text` a line: prompts only")],
    out: Annotated[Path, path_option(help="directory for signatures, the answer and the merge")],
    config: FindConfig,
    engine: EngineConfig,
    signatures: Annotated[
        PathOrUri | None, place_option(help="where they are kept; default: OUT/signatures; `simmerge signals` has some")
    ] = None,
    tasks: Annotated[
        PathOrUri | None, place_option(help="directory of <task>.jsonl with prompt and target: labels, for --evaluate")
    ] = None,
    evaluate: Annotated[int, typer.Option(min=0, help="merges to measure on --tasks, which then decide")] = 0,
    write: Annotated[bool, typer.Option(help="write a merge that is the answer to OUT/merged")] = True,
    log: LogOption = DEFAULT_LOG,
) -> dict[str, Any]:
    """Find the merge that keeps most of what its members answer to unlabeled probes, and make it; no label is needed.

    Example: simmerge auto catalogue.yaml --probes probes --out best --evaluator transformers. With --tasks and
    --evaluate the best few are measured, and that is the last word. An interrupted run goes on with the same command.
    """
    started = time.monotonic()
    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.checkpoints.probes import load_probe_sets
    from simmerge_ray.pipelines.auto.answer import SIGNATURES, auto_outputs, check_auto, check_evaluation, own_labels
    from simmerge_ray.pipelines.auto.request import AutoRun
    from simmerge_ray.search.evaluation import load_tasks
    from simmerge_ray.selector.finding.sources import find_request

    check_evaluation(evaluate, tasks is not None)
    where = str(signatures) if signatures is not None else str((out / SIGNATURES).resolve())
    check_outputs(auto_outputs(out, where, write), {"CATALOGUE": catalogue, "--probes": probes, "--tasks": tasks})
    request = find_request(load_catalogue(catalogue), load_probe_sets(probes), config)
    search = SearchConfig(**engine.model_dump(), pairs="all")
    labels = {} if tasks is None else own_labels(load_tasks(tasks), request.catalogue, str(tasks))
    labels = {name: task.sampled(search.max_items, search.seed) for name, task in labels.items()}
    run = AutoRun(request, search, out, where, labels, evaluate, write)
    from simmerge_ray.on_ray.resources import only_job

    # Of two submissions of one job the second waits, and then finds everything in place. Checks are in it: they hash.
    with only_job(str(out.resolve()), typer.echo):
        check_auto(run)
        answer = _run(run, log, started)
    return {"out": str(out), **answer}


def _run(run: AutoRun, log: Path | None, started: float) -> dict[str, Any]:
    """Everything after the checks; returns the answer."""
    from simmerge_ray.base.progress import narrated

    with narrated(log) as narrator:
        from simmerge_ray.pipelines.auto.answer import label_free_json, write_stage
        from simmerge_ray.pipelines.auto.find import find_stages
        from simmerge_ray.pipelines.dataset import input_digests, say_twins

        say_twins(run.request.catalogue, narrator)
        found = find_stages(run, narrator)
        best, content = found.best.plan, label_free_json(run, found)
        narrator.console.print(retention_table(found))
        narrator.print_lines(retention_lines(found))
        if run.evaluate:
            from simmerge_ray.pipelines.auto.measure import measure_stage, measured_json

            measurement = measure_stage(run, found, narrator)
            narrator.console.print(measured_table(run, measurement))
            narrator.print_lines(measured_lines(measurement))
            best, content = measurement.verdict.winner.plan, content | measured_json(run, measurement)
        request = run.request
        inputs = input_digests(request.catalogue, run.tasks)
        inputs |= {f"probes {task}": one.digest for task, one in request.probe_sets.items()}
        options = {
            "find": run.request.config.model_dump(mode="json"),
            "evaluate": run.evaluate,
            "search": run.engine.content(),
        }
        return write_stage(run, best, content, Manifest("auto", options, inputs), started, narrator)


def retention_table(found: LabelFree) -> Table:
    """What the answer keeps of every owner's answers, beside the plain average and each checkpoint as it is."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="kept of the members' own answers", title_justify="left")
    for column in ("", "merge or checkpoint", "score"):
        table.add_column(column, overflow="fold", justify="right" if column == "score" else "left")
    for owner in found.finding.aim.owners:
        table.add_column(f"{owner.checkpoint} on {owner.task}", justify="right", overflow="fold")
    for one in found.lines:
        mark = "*" if one.plan.id == found.best.plan.id else ""
        kept = [f"{100 * share:.0f} %" for share in one.retention]
        table.add_row(mark, escape(_text(one.plan, found)), f"{one.score:.3f}", *kept)
    return table


def _text(plan: MergePlan, found: LabelFree) -> str:
    members = " + ".join(plan.members)
    if plan == found.finding.average:
        return f"plain average: {members}"
    return f"tuned: {members}" if any(plan.id == one.whole.plan.id for one in found.tuned) else plan.label


def retention_lines(found: LabelFree) -> list[str]:
    """The answer without labels, in words."""
    best, single = found.best, found.finding.checkpoints[0]
    said = ["score: (share of answers kept + probability of an answer's token) / 2, by the objective over tasks"]
    if not best.plan.is_merge:
        return [*said, f"answer: keep {best.plan.label}: no merge keeps more"]
    said.append(f"answer: merge {_text(best.plan, found)}")
    said.append(f"its score is {best.score:.3f}, that of the best checkpoint, {single.plan.label}, {single.score:.3f}")
    for one in found.tuned[:1]:
        word = "the tuned merge is taken" if one.is_better else "tuning does not help"
        said.append(f"{word}: {one.held_out.score:.3f} against {one.rival.score:.3f} on probes held out")
    return said


def measured_table(run: AutoRun, found: Measurement) -> Table:
    """Merges and checkpoints, the best of the choosing half first; `*` marks the answer."""
    from rich.markup import escape
    from rich.table import Table

    from simmerge_ray.search.winner import objective_estimate

    table = Table(title=f"utility, {found.objective.name} of {', '.join(run.tasks)}", title_justify="left")
    table.add_column("")
    table.add_column("merge or checkpoint", overflow="fold", min_width=16)
    for column in ("score", "chosen by", "measured", "se", *run.tasks):
        table.add_column(column, justify="right")
    for line in found.lines:
        mark = "*" if line.plan.id == found.verdict.winner.plan.id else ""
        score = "" if line.score is None else f"{line.score:.3f}"
        row, measured = [mark, escape(line.plan.label), score], line.measured
        if measured is None:
            table.add_row(*row, "", "failed", "", *[""] * len(run.tasks))
            continue
        utility = objective_estimate(measured.reporting, found.objective)
        chosen_by = objective_estimate(measured.choosing, found.objective)
        by_task = [f"{measured.reporting[task].mean():.3f}" for task in run.tasks]
        table.add_row(*row, f"{chosen_by.value:.3f}", f"{utility.value:.3f}", f"{utility.se:.3f}", *by_task)
    return table


def measured_lines(found: Measurement) -> list[str]:
    """The measured answer in words, by how much, and what it says of the score."""
    verdict = found.verdict
    winner, sizes = verdict.winner.plan.label, [len(items) for items in verdict.winner.reporting.values()]
    said = ["chosen by: half of the items; measured, se and tasks: the other half, which had no part in the choice"]
    said += [f"not measured: {line.plan.label}: {line.reason}" for line in found.lines if line.measured is None]
    on = "-".join(map(str, sorted({min(sizes), max(sizes)})))
    utility = f"{verdict.utility.value:.3f} ± {verdict.utility.se:.3f} on {on} items of each task"
    if verdict.best_merge is None:
        said.append(f"answer: keep {winner}, {utility}: no merge could be measured")
    elif verdict.best_single is None:
        said.append(f"answer: merge {winner}, {utility}; no checkpoint could be measured beside it")
    elif verdict.keeps_checkpoint:
        said.append(f"answer: keep {winner}, {utility}: no measured merge beats it")
        said.append(f"the best merge, {verdict.best_merge.plan.label}, against it: {_advantage_text(verdict)}")
    else:
        said.append(f"answer: merge {winner}, {utility}")
        said.append(f"against the best checkpoint, {verdict.best_single.plan.label}: {_advantage_text(verdict)}")
    return said + list(_proxy_lines(found))


def _proxy_lines(found: Measurement) -> Sequence[str]:
    if found.agreement is None:
        return [f"too few candidates ({found.num_ranked}) have a score and labels to say whether the score is right"]
    text = f"rank correlation of score and labels: {found.agreement:+.2f} over {found.num_ranked}"
    if found.agreement <= 0:
        return [f"{text}: on this base the score misleads; do not choose by it without labels"]
    return [text]


def _advantage_text(verdict: Verdict) -> str:
    assert verdict.advantage is not None and verdict.chosen_by is not None
    text = f"{_signed(verdict.advantage)} ({_signed(verdict.chosen_by)} on the half that chose), "
    within = "within two paired standard errors: these items do not tell the two apart"
    text += "more than two paired standard errors" if verdict.advantage.is_clear else within
    disagree = verdict.advantage.value * verdict.chosen_by.value < 0
    return text + ("; the halves disagree which is better, so take more items" if disagree else "")


def _signed(difference: ObjectiveEstimate) -> str:
    return f"{difference.value:+.3f} ± {difference.se:.3f}"
