"""`simmerge auto` after the ranking: measure the first plans beside their members and the base, and take the best.

The directory gets `labels` (a label store, the only state: a run that was stopped goes on), `plans` (what was measured,
with the predictions), `auto.json` (the answer and every figure), and where a merge is the answer its plan file
`plan.json` and the merge itself, `merged`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import LabelError, OutputError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import Manifest, write_json
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.merging.write.directory import PLAN_FILE, check_target, write_merge
from simmerge_ray.pipelines.dataset import local_resources, search_bar
from simmerge_ray.plans.plan import MergePlan, fold_text, read_plan, resolve_plan, write_plan
from simmerge_ray.search.estimate import estimate_search
from simmerge_ray.search.evaluation import EvaluationTask
from simmerge_ray.search.labels import Infeasible, LabelStore, Measured, Outcome
from simmerge_ray.search.objectives import Objective
from simmerge_ray.search.setup import PreparedSearch, prepare_search
from simmerge_ray.search.winner import (
    Candidate,
    ObjectiveEstimate,
    Verdict,
    check_items,
    choose_winner,
    objective_estimate,
)
from simmerge_ray.selector.planning.files import write_plans
from simmerge_ray.selector.planning.scorer import RankedPlan, Ranking

LABELS, PLANS, MERGED, ANSWER, PLAN, MANIFEST = "labels", "plans", "merged", "auto.json", "plan.json", "manifest.json"


@dataclass(frozen=True)
class Line:
    """One merge or checkpoint: what was predicted (merges alone), and what was measured, or why it was not."""

    plan: MergePlan
    predicted: RankedPlan | None
    measured: Candidate | None
    reason: str | None


def on_same_tasks(catalogue: Catalogue) -> Catalogue:
    """The catalogue without own tasks: every merge and checkpoint is measured on all tasks that are given."""
    return replace(catalogue, own_task=dict.fromkeys(catalogue.ids))


def check_auto(
    catalogue: Catalogue, tasks: Mapping[str, EvaluationTask], config: SearchConfig, out: Path, write: bool
) -> PreparedSearch:
    """Whatever can be checked before the ranking.

    Args:
        config: `pairs` is `all`.

    Raises:
        InputError: what cannot be used.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file; labels, plans and the merge go into a directory")
    if write:
        check_target(out / MERGED)
    for name, task in tasks.items():
        check_items(name, task.num_items)
    return prepare_search(on_same_tasks(catalogue), tasks, config, str((out / LABELS).resolve()))


def dry_run_lines(study: PreparedSearch, ranking: Ranking, own_task: Mapping[str, str | None], out: Path) -> list[str]:
    """What would be measured, and what it would take."""
    from simmerge_ray.capacity.engines import engines_that_fit
    from simmerge_ray.search.proposers import make_proposer

    total = make_proposer(study, plans_to_measure(ranking, study.catalogue)).total
    found = estimate_search(study, total, engines_that_fit(study, local_resources()))
    plans = [
        f"  {number}. {fold_text(one.plan)}  (predicted {one.utility:.3f})"
        for number, one in enumerate(ranking.plans, 1)
    ]
    singles = [plan.label for plan in single_plans(ranking, study.catalogue)]
    return [
        f"merges   {len(plans)}, measured in memory:",
        *plans,
        *extrapolation_lines(ranking, own_task, list(study.tasks)),
        f"beside   {', '.join(singles)}",
        f"tasks    {', '.join(f'{name} ({task.num_items} items)' for name, task in study.tasks.items())}",
        *found.lines()[: 3 if found.seconds is not None or not total else 2],
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


def single_plans(ranking: Ranking, catalogue: Catalogue) -> list[MergePlan]:
    """The members of the ranked plans, and the base."""
    names = [member for one in ranking.plans for member in one.plan.members]
    return [
        MergePlan(source=name) for name in dict.fromkeys([*names, *([catalogue.base.id] if catalogue.base else [])])
    ]


def plans_to_measure(ranking: Ranking, catalogue: Catalogue) -> list[MergePlan]:
    """The checkpoints as they are, then the merges: a bad checkpoint is named first."""
    return [*single_plans(ranking, catalogue), *(one.plan for one in ranking.plans)]


def auto_stage(
    catalogue: Catalogue,
    tasks: Mapping[str, EvaluationTask],
    objective: Objective,
    ranking: Ranking,
    config: SearchConfig,
    out: Path,
    narrator: Narrator,
    manifest: Manifest,
    write: bool = True,
) -> Verdict:
    """Measure what is missing, decide, write the answer, and (a merge, `write`) the merged checkpoint.

    Args:
        manifest: of all that the answer depends on.

    Raises:
        LabelError: nothing could be measured. EngineError: the evaluator did not start. OutputError: see `write_merge`.
    """
    started = time.monotonic()
    write_plans(out / PLANS, ranking, catalogue)
    with narrator.stage("measure") as stage:
        from simmerge_ray.on_ray.merge_search import run_search

        plans = plans_to_measure(ranking, catalogue)
        with search_bar(narrator) as report:
            result = run_search(on_same_tasks(catalogue), tasks, config, (out / LABELS).resolve(), plans, report)
        stage.result = f"{result.num_trials_run} of {len(plans)} measured now, by {config.evaluator} -> {out / LABELS}"
    lines = _lines(result.search, plans, {one.plan.id: one for one in ranking.plans})
    measured = [one.measured for one in lines if one.measured is not None]
    if not measured:
        raise LabelError(f"nothing could be measured: {lines[0].reason}; --retry-infeasible tries again")
    verdict = choose_winner(measured, objective)
    lines.sort(key=lambda one: -objective_estimate(one.measured.choosing, objective).value if one.measured else 1.0)
    narrator.console.print(answer_table(lines, verdict, objective, tasks))
    for text in [
        *extrapolation_lines(ranking, catalogue.own_task, list(tasks)),
        *answer_lines(lines, verdict, objective),
    ]:
        narrator.console.print(text, highlight=False, soft_wrap=True, markup=False)
    merged = _write(catalogue, verdict, ranking, out, narrator, manifest, write)
    write_json(out / ANSWER, answer_json(lines, verdict, objective, tasks, merged))
    manifest.write(out / MANIFEST, time.monotonic() - started, {"answer": verdict.winner.plan.label})
    return verdict


def _lines(study: PreparedSearch, plans: Sequence[MergePlan], predicted: Mapping[str, RankedPlan]) -> list[Line]:
    known = {label.key: label.outcome for label in LabelStore(study.labels_uri).read()}
    lines = []
    for plan in plans:
        outcomes: dict[str, Outcome] = {task: known[study.key(plan, task)] for task in study.tasks}
        items = {task: one.items for task, one in outcomes.items() if isinstance(one, Measured)}
        reasons = [one.reason for one in outcomes.values() if isinstance(one, Infeasible)]
        measured = Candidate(plan, items) if len(items) == len(study.tasks) else None
        lines.append(Line(plan, predicted.get(plan.id), measured, reasons[0] if reasons else None))
    return lines


def _write(
    catalogue: Catalogue,
    verdict: Verdict,
    ranking: Ranking,
    out: Path,
    narrator: Narrator,
    manifest: Manifest,
    write: bool,
) -> Path | None:
    """The plan file of a merge that won, and the merge; the path of the merge if it is there."""
    target = out / MERGED
    if verdict.keeps_checkpoint:
        (out / PLAN).unlink(missing_ok=True)  # of an earlier answer
        if target.exists():
            narrator.console.print(f"{target} is the merge of an earlier answer, not of this one", soft_wrap=True)
        return None
    plan = verdict.winner.plan
    ranked = next(one for one in ranking.plans if one.plan.id == plan.id)
    predicted = {task: {"utility": utility, "sd": sd} for task, (utility, sd) in ranked.by_task.items()}
    resolved = resolve_plan(plan, catalogue)
    write_plan(out / PLAN, resolved, predicted)
    if not write:
        narrator.say(f"make it with: simmerge merge {out / PLAN} OUT")
        return None
    there = manifest.is_current(out / MANIFEST) and (target / PLAN_FILE).exists()
    with narrator.stage("merge") as stage:
        if there and read_plan(target / PLAN_FILE)[0].plan.id == plan.id:
            stage.result = f"already there -> {target}"
            return target
        with narrator.byte_bar("bytes written") as report:
            merged = write_merge(resolved, target, predicted, report)
        stage.result = f"{merged.num_bytes / 1e9:.3g} GB -> {target}"
    return target


def answer_table(
    lines: Sequence[Line], verdict: Verdict, objective: Objective, tasks: Mapping[str, EvaluationTask]
) -> Table:
    """Merges and checkpoints, the best of the choosing half first; `*` marks the answer."""
    table = Table(title=f"utility, {_objective_text(objective, list(tasks))}", title_justify="left")
    table.add_column("")
    table.add_column("plan or checkpoint", overflow="fold", min_width=16)
    for column in ("predicted", "interval", "chosen by", "measured", "se", *tasks):
        table.add_column(column, justify="right", no_wrap=column == "interval")
    for one in lines:
        mark = "*" if one.plan.id == verdict.winner.plan.id else ""
        predicted = [f"{one.predicted.utility:.3f}", _interval_text(one.predicted)] if one.predicted else ["", ""]
        if one.measured is None:
            table.add_row(mark, escape(_text(one.plan)), *predicted, "", "failed", "", *[""] * len(tasks))
            continue
        utility = objective_estimate(one.measured.reporting, objective)
        chosen_by = objective_estimate(one.measured.choosing, objective)
        by_task = [f"{one.measured.reporting[task].mean():.3f}" for task in tasks]
        table.add_row(
            mark, escape(_text(one.plan)), *predicted,
            f"{chosen_by.value:.3f}", f"{utility.value:.3f}", f"{utility.se:.3f}", *by_task,
        )  # fmt: skip
    return table


def _interval_text(one: RankedPlan) -> str:
    low, high = one.interval
    return f"{low:.2f}-{high:.2f}"


def _text(plan: MergePlan) -> str:
    return fold_text(plan) if plan.steps else plan.label


def _objective_text(objective: Objective, tasks: Sequence[str]) -> str:
    if objective.weights:
        return objective.name
    return tasks[0] if len(tasks) == 1 else f"{objective.name} of {', '.join(tasks)}"


def answer_lines(lines: Sequence[Line], verdict: Verdict, objective: Objective) -> list[str]:
    """The answer in words, and by how much."""
    sizes = [len(items) for items in verdict.winner.reporting.values()]
    said = [
        "chosen by: half of the items; measured, se and tasks: the other half, which had no part in the choice; "
        "interval: 95 % of the spread of the selector's ensemble"
    ]
    said += [f"not measured: {_text(one.plan)}: {one.reason}" for one in lines if one.measured is None]
    on = "-".join(map(str, sorted({min(sizes), max(sizes)})))
    utility = f"{verdict.utility.value:.3f} ± {verdict.utility.se:.3f} on {on} items of each task"
    if verdict.best_merge is None:
        said.append(f"answer: keep {_text(verdict.winner.plan)}, {utility}: no merge could be measured")
    elif verdict.best_single is None:
        said.append(f"answer: merge {_text(verdict.winner.plan)}, {utility}; no checkpoint could be measured beside it")
    elif verdict.keeps_checkpoint:
        said.append(f"answer: keep {_text(verdict.winner.plan)}, {utility}: no measured merge beats it")
        said.append(f"the best merge, {_text(verdict.best_merge.plan)}, against it: {_advantage_text(verdict)}")
    else:
        said.append(f"answer: merge {_text(verdict.winner.plan)}, {utility}")
        said.append(f"against the best checkpoint, {verdict.best_single.plan.label}: {_advantage_text(verdict)}")
    return said


def _advantage_text(verdict: Verdict) -> str:
    assert verdict.advantage is not None and verdict.chosen_by is not None
    text = f"{_signed(verdict.advantage)} ({_signed(verdict.chosen_by)} on the half that chose), "
    if verdict.advantage.is_clear:
        text += "more than two paired standard errors"
    else:
        text += "within two paired standard errors: these items do not tell the two apart"
    if verdict.advantage.value * verdict.chosen_by.value < 0:
        text += "; the halves disagree which is better, so take more items"
    return text


def _signed(one: ObjectiveEstimate) -> str:
    return f"{one.value:+.3f} ± {one.se:.3f}"


def answer_json(
    lines: Sequence[Line],
    verdict: Verdict,
    objective: Objective,
    tasks: Mapping[str, EvaluationTask],
    merged: Path | None,
) -> dict[str, Any]:
    """JSON value of the answer."""
    return {
        "answer": "keep" if verdict.keeps_checkpoint else "merge",
        "winner": verdict.winner.plan.label,
        "plan": verdict.winner.plan.to_json(),
        "merged": str(merged) if merged else None,
        "objective": objective.name,
        "num_items": {name: task.num_items for name, task in tasks.items()},
        "halves": "chosen on the even items (0, 2, ...), reported from the odd ones",
        "utility": _json(verdict.utility),
        "best_single": verdict.best_single.plan.label if verdict.best_single else None,
        "best_merge": verdict.best_merge.plan.label if verdict.best_merge else None,
        "merge_minus_single": {
            "reporting": _json(verdict.advantage) if verdict.advantage else None,
            "choosing": _json(verdict.chosen_by) if verdict.chosen_by else None,
            "within_two_standard_errors": None if verdict.advantage is None else not verdict.advantage.is_clear,
        },
        "candidates": [_line_json(one, objective) for one in lines],
    }


def _line_json(line: Line, objective: Objective) -> dict[str, Any]:
    content: dict[str, Any] = {"label": line.plan.label, "plan": line.plan.to_json(), "predicted": None}
    if one := line.predicted:
        by_task = {task: {"utility": utility, "sd": sd} for task, (utility, sd) in one.by_task.items()}
        content["predicted"] = {
            "utility": one.utility,
            "sd": one.sd,
            "interval": list(one.interval),
            "by_task": by_task,
        }
    if line.measured is None:
        return content | {"infeasible": line.reason}
    for name, items in (("choosing", line.measured.choosing), ("reporting", line.measured.reporting)):
        by_task = {task: _json(objective_estimate({task: values}, Objective("mean"))) for task, values in items.items()}
        content[name] = _json(objective_estimate(items, objective)) | {"by_task": by_task}
    return content


def _json(one: ObjectiveEstimate) -> dict[str, float]:
    return {"value": one.value, "se": one.se}
