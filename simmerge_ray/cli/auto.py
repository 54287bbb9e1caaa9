"""`simmerge auto`: from a catalogue and probes to the merge that keeps most of its members, or to "keep this one".

`jobs/find_merge.py` is the same command as a job.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simmerge_ray.base.config import EngineConfig
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.base.storage import Manifest, check_outputs, read_json
from simmerge_ray.base.tables import TextTable, columns_of
from simmerge_ray.cli.job_line import with_job_line
from simmerge_ray.cli.options import DEFAULT_LOG, LogOption, with_config_options
from simmerge_ray.cli.places import CatalogueArgument, PathOrUri, path_option, place_option
from simmerge_ray.cli.shown import JsonOption, Shown, WideOption

if TYPE_CHECKING:
    from simmerge_ray.base.progress import Narrator
    from simmerge_ray.pipelines.auto.measure import Measurement
    from simmerge_ray.pipelines.auto.request import AutoRun, LabelFree
    from simmerge_ray.plans.plan import MergePlan

_WHOLE = 0.95  # share of its own answers that a checkpoint keeps, less a near-equal token or two


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
    predictor: Annotated[
        PathOrUri | None,
        place_option(help="says what utility to expect; `simmerge predictor train` makes one of labels of this base"),
    ] = None,
    evaluate: Annotated[int, typer.Option(min=0, help="merges to measure on --tasks, which then decide")] = 0,
    write: Annotated[bool, typer.Option(help="write a merge that is the answer to OUT/merged")] = True,
    wide: WideOption = False,
    as_json: JsonOption = False,
    log: LogOption = DEFAULT_LOG,
) -> dict[str, Any]:
    """Find the merge that keeps most of what its members answer to unlabeled probes, and make it; no label is needed.

    With --tasks and --evaluate the best few are measured, and that is the last word. An interrupted run goes on with
    the same command.
    """
    started = time.monotonic()
    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.checkpoints.probes import load_probe_sets
    from simmerge_ray.pipelines.auto.answer import ANSWER, auto_outputs, auto_run, check_auto, check_evaluation
    from simmerge_ray.selector.finding.sources import find_request

    check_evaluation(evaluate, tasks is not None or bool(engine.lm_eval))
    given = {"CATALOGUE": catalogue, "--probes": probes, "--tasks": tasks}
    check_outputs(auto_outputs(out, signatures, write), given)
    request = find_request(load_catalogue(catalogue), load_probe_sets(probes), config)
    run = auto_run(request, engine, out, signatures, tasks, evaluate, write, predictor)
    shown = Shown(log, wide, as_json)
    from simmerge_ray.on_ray.resources import only_job

    # Of two submissions of one job the second waits, and then finds everything in place. Checks are in it: they hash.
    with only_job(str(out.resolve()), partial(typer.echo, err=as_json)):
        check_auto(run)
        with shown.narrated() as narrator:
            answer = answer_run(run, narrator, started)
    shown.result(read_json(out / ANSWER))
    return {"out": str(out), **answer}


def answer_run(run: AutoRun, narrator: Narrator, started: float) -> dict[str, Any]:
    """Everything after the checks; returns the answer."""
    from simmerge_ray.pipelines.auto.answer import label_free_json, write_stage
    from simmerge_ray.pipelines.auto.expected import expect
    from simmerge_ray.pipelines.auto.find import find_stages
    from simmerge_ray.pipelines.dataset import input_digests, say_twins

    say_twins(run.request.catalogue, narrator)
    found = find_stages(run, narrator)
    best, content = found.best.plan, label_free_json(run, found)
    narrator.print_lines(retention_lines(found))
    narrator.table(retention_table(found))
    if expected := expect(run, found):
        narrator.print_lines(expected.lines(best))
    if run.evaluate:
        from simmerge_ray.pipelines.auto.measure import measure_stage, measured_json

        measurement = measure_stage(run, found, narrator)
        narrator.print_lines(measurement.verdict.lines())
        narrator.table(measured_table(run, measurement))
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


def retention_table(found: LabelFree) -> TextTable:
    """What the answer keeps of every owner's answers, beside the plain average and each checkpoint as it is."""
    owners = [f"{owner.checkpoint} on {owner.task}" for owner in found.finding.aim.owners]
    columns = columns_of(["", "merge or checkpoint"], ["score", *owners])
    rows = []
    for one in found.lines:
        mark = "*" if one.plan.id == found.best.plan.id else ""
        kept = [f"{100 * share:.0f} %" for share in one.retention]
        rows.append([mark, _text(one.plan, found), f"{one.score:.3f}", *kept])
    return TextTable("kept of the members' own answers", columns, rows)


def _text(plan: MergePlan, found: LabelFree) -> str:
    if plan == found.finding.average:
        return f"plain average: {' + '.join(plan.members)}"
    return f"{plan.label}, tuned" if any(plan.id == one.whole.plan.id for one in found.tuned) else plan.label


def retention_lines(found: LabelFree) -> list[str]:
    """The answer without labels, in words, the answer first."""
    from simmerge_ray.search.winner import keep_text

    best, single = found.best, found.finding.checkpoints[0]
    if not best.plan.is_merge:
        kept = keep_text(best.plan.label, is_base=best.plan.source == found.finding.aim.base)
        said = [f"answer: {kept}: no merge keeps more"]
    else:
        said = [f"answer: merge {_text(best.plan, found)}"]
        said.append(
            f"its score is {best.score:.3f}, that of the best checkpoint, {single.plan.label}, {single.score:.3f}"
        )
        for one in found.tuned[:1]:
            word = "the tuned merge is taken" if one.is_better else "tuning does not help"
            both = [f"score {probed.score:.3f}, {probed.kept:.3f} kept" for probed in (one.held_out, one.rival)]
            said.append(f"{word}: {' against '.join(both)} on {one.held_out.num_probes} probes a task held out")
    for owner, share in zip(found.finding.aim.owners, best.retention.tolist(), strict=True):
        if share == 0:
            said.append(f"warning: the answer keeps none of the answers of {owner.checkpoint} on {owner.task}")
    said += _coarse_lines(found)
    said.append("score: (share of answers kept + probability of an answer's token) / 2, by the objective over tasks")
    return said


def _coarse_lines(found: LabelFree) -> Iterator[str]:
    """That the yardstick is coarse: a checkpoint, run as candidates are, that does not repeat its own answers."""
    owners, of_checkpoints = found.finding.aim.owners, {one.plan.source: one for one in found.finding.checkpoints}
    low = []
    for number, owner in enumerate(owners):
        one = of_checkpoints.get(owner.checkpoint)
        if one is not None and one.retention[number] < _WHOLE:
            low.append(f"{owner.checkpoint} {100 * one.retention[number]:.0f} %")
    if low:
        yield (
            f"note: run as a candidate, these keep so much of their own answers: {', '.join(low)}. Answers are made in "
            "float32; in the candidates' precision near-equal tokens swap. Compare with that, not with 100 %"
        )


def measured_table(run: AutoRun, found: Measurement) -> TextTable:
    """Merges and checkpoints, the best of the choosing half first; `*` marks the answer."""
    from simmerge_ray.search.winner import objective_estimate

    columns = columns_of(
        ["", "merge or checkpoint"], ["measured", "se", *run.tasks, "chosen by", "score"], ["chosen by", "score", "se"]
    )
    rows = []
    for line in found.lines:
        mark = "*" if line.plan.id == found.verdict.winner.plan.id else ""
        score, measured = "" if line.score is None else f"{line.score:.3f}", line.measured
        if measured is None:
            rows.append([mark, line.plan.label, "failed", "", *[""] * len(run.tasks), "", score])
            continue
        utility = objective_estimate(measured.reporting, found.objective)
        chosen_by = objective_estimate(measured.choosing, found.objective)
        by_task = [f"{measured.reporting[task].mean():.3f}" for task in run.tasks]
        told = [f"{utility.value:.3f}", f"{utility.se:.3f}", *by_task, f"{chosen_by.value:.3f}", score]
        rows.append([mark, line.plan.label, *told])
    return TextTable(f"utility, {found.objective.name} of {', '.join(run.tasks)}", columns, rows)


def measured_lines(found: Measurement) -> list[str]:
    """Beside the measured answer: what was measured how, and what it says of the score."""
    said = ["chosen by: half of the items; measured, se and tasks: the other half, which had no part in the choice"]
    said += [f"not measured: {line.plan.label}: {line.reason}" for line in found.lines if line.measured is None]
    return said + list(_proxy_lines(found))


def _proxy_lines(found: Measurement) -> Sequence[str]:
    if found.agreement is None:
        return [f"too few candidates ({found.num_ranked}) have a score and labels to say whether the score is right"]
    text = f"rank correlation of score and labels: {found.agreement:+.2f} over {found.num_ranked}"
    if found.agreement <= 0:
        return [f"{text}: on this base the score misleads; do not choose by it without labels"]
    return [text]
