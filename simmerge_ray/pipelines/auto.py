"""`simmerge auto` after the ranking: measure the first plans beside their members and the base, and take the best.

The directory gets `labels` (a label store, the only state: a run that was stopped goes on), `plans` (what was measured,
with the predictions), `auto.json` (the answer and every figure), and where a merge is the answer its plan file
`plan.json` and the merge itself, `merged`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import LabelError, OutputError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import Manifest, write_json
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.merging.write.directory import write_merge
from simmerge_ray.merging.write.output import PLAN_FILE, check_target
from simmerge_ray.pipelines.dataset import local_resources, search_bar
from simmerge_ray.plans.plan import MergePlan, read_plan, resolve_plan, write_plan
from simmerge_ray.search.estimate import estimate_search
from simmerge_ray.search.evaluation import EvaluationTask
from simmerge_ray.search.labels import Infeasible, LabelStore, Measured, Outcome
from simmerge_ray.search.objectives import Objective
from simmerge_ray.search.setup import PreparedSearch, prepare_search
from simmerge_ray.search.winner import Candidate, Verdict, check_items, choose_winner, objective_estimate
from simmerge_ray.selector.planning.files import write_plans
from simmerge_ray.selector.planning.scorer import RankedPlan, Ranking

LABELS, PLANS, MERGED, ANSWER, PLAN, MANIFEST = "labels", "plans", "merged", "auto.json", "plan.json", "manifest.json"


@dataclass(frozen=True)
class AutoRun:
    """What is measured, all of it on all `tasks`, and where the answer goes; a merge is made if `write`."""

    catalogue: Catalogue
    tasks: Mapping[str, EvaluationTask]
    objective: Objective
    config: SearchConfig
    out: Path
    write: bool = True

    @property
    def labels(self) -> Path:
        return (self.out / LABELS).resolve()


@dataclass(frozen=True)
class Line:
    """One merge or checkpoint: what was predicted (merges alone), and what was measured, or why it was not."""

    plan: MergePlan
    predicted: RankedPlan | None
    measured: Candidate | None
    reason: str | None


@dataclass(frozen=True)
class Answer:
    """lines: merges and checkpoints, the best of the choosing half first."""

    lines: tuple[Line, ...]
    verdict: Verdict


def on_same_tasks(catalogue: Catalogue) -> Catalogue:
    """The catalogue without own tasks: every merge and checkpoint is measured on all tasks that are given."""
    return replace(catalogue, own_task=dict.fromkeys(catalogue.ids))


def check_auto(run: AutoRun) -> PreparedSearch:
    """Whatever can be checked before the ranking; InputError says what cannot be used."""
    if run.out.exists() and not run.out.is_dir():
        raise OutputError(f"--out {run.out} is a file; labels, plans and the merge go into a directory")
    if run.write:
        check_target(run.out / MERGED)
    for name, task in run.tasks.items():
        check_items(name, task.num_items)
    return prepare_search(on_same_tasks(run.catalogue), run.tasks, run.config, str(run.labels))


def cost_lines(search: PreparedSearch, ranking: Ranking) -> list[str]:
    """What it would take to measure what is not measured yet."""
    from simmerge_ray.capacity.engines import engines_that_fit
    from simmerge_ray.search.proposers import make_proposer

    total = make_proposer(search, plans_to_measure(ranking, search.catalogue)).total
    found = estimate_search(search, total, engines_that_fit(search, local_resources()))
    return found.lines()[: 3 if found.seconds is not None or not total else 2]


def single_plans(ranking: Ranking, catalogue: Catalogue) -> list[MergePlan]:
    """The members of the ranked plans, and the base."""
    names = [member for one in ranking.plans for member in one.plan.members]
    names += [catalogue.base.id] if catalogue.base else []
    return [MergePlan(source=name) for name in dict.fromkeys(names)]


def plans_to_measure(ranking: Ranking, catalogue: Catalogue) -> list[MergePlan]:
    """The checkpoints as they are, then the merges: a bad checkpoint is named first."""
    return [*single_plans(ranking, catalogue), *(one.plan for one in ranking.plans)]


def measure_stage(run: AutoRun, ranking: Ranking, narrator: Narrator) -> Answer:
    """Measure what is missing, and decide. LabelError: nothing could be measured; EngineError: no evaluator started."""
    write_plans(run.out / PLANS, ranking, run.catalogue)
    with narrator.stage("measure") as stage:
        from simmerge_ray.on_ray.merge_search import run_search

        plans = plans_to_measure(ranking, run.catalogue)
        with search_bar(narrator) as report:
            result = run_search(on_same_tasks(run.catalogue), run.tasks, run.config, run.labels, plans, report)
        counts = f"{result.num_trials_run} of {len(plans)} measured now"
        stage.result = f"{counts}, by {run.config.evaluator} -> {run.out / LABELS}"
    lines = _lines(result.search, plans, {one.plan.id: one for one in ranking.plans})
    measured = [line.measured for line in lines if line.measured is not None]
    if not measured:
        raise LabelError(f"nothing could be measured: {lines[0].reason}; --retry-infeasible tries again")

    def place(line: Line) -> float:
        return -objective_estimate(line.measured.choosing, run.objective).value if line.measured else 1.0

    return Answer(tuple(sorted(lines, key=place)), choose_winner(measured, run.objective))


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


def write_stage(run: AutoRun, answer: Answer, manifest: Manifest, started: float, narrator: Narrator) -> None:
    """Write the answer, and (a merge, `write`) the merged checkpoint; errors as `write_merge`. manifest: of all that
    the answer depends on. started: `time.monotonic()` of the whole run."""
    merged = _write_winner(run, answer, manifest, narrator)
    write_json(run.out / ANSWER, answer_json(run, answer, merged))
    manifest.write(run.out / MANIFEST, time.monotonic() - started, {"answer": answer.verdict.winner.plan.label})


def _write_winner(run: AutoRun, answer: Answer, manifest: Manifest, narrator: Narrator) -> Path | None:
    """The plan file of a merge that won, and the merge; the path of the merge if it is there."""
    target, plan = run.out / MERGED, answer.verdict.winner.plan
    if answer.verdict.keeps_checkpoint:
        (run.out / PLAN).unlink(missing_ok=True)  # of an earlier answer
        if target.exists():
            narrator.console.print(f"{target} is the merge of an earlier answer, not of this one", soft_wrap=True)
        return None
    ranked = next(line.predicted for line in answer.lines if line.plan.id == plan.id)
    predicted = ranked.predicted if ranked else {}
    resolved = resolve_plan(plan, run.catalogue)
    write_plan(run.out / PLAN, resolved, predicted)
    if not run.write:
        narrator.say(f"make it with: simmerge merge {run.out / PLAN} OUT")
        return None
    there = manifest.is_current(run.out / MANIFEST) and (target / PLAN_FILE).exists()
    with narrator.stage("merge") as stage:
        if there and read_plan(target / PLAN_FILE)[0].plan.id == plan.id:
            stage.result = f"already there -> {target}"
            return target
        with narrator.byte_bar("bytes written") as report:
            merged = write_merge(resolved, target, predicted, report)
        stage.result = f"{merged.num_bytes / 1e9:.3g} GB -> {target}"
    return target


def answer_json(run: AutoRun, answer: Answer, merged: Path | None) -> dict[str, Any]:
    """JSON value of the answer."""
    verdict = answer.verdict
    return {
        "answer": "keep" if verdict.keeps_checkpoint else "merge",
        "winner": verdict.winner.plan.label,
        "plan": verdict.winner.plan.to_json(),
        "merged": str(merged) if merged else None,
        "objective": run.objective.name,
        "num_items": {name: task.num_items for name, task in run.tasks.items()},
        "halves": "chosen on the even items (0, 2, ...), reported from the odd ones",
        "utility": asdict(verdict.utility),
        "best_single": verdict.best_single.plan.label if verdict.best_single else None,
        "best_merge": verdict.best_merge.plan.label if verdict.best_merge else None,
        "merge_minus_single": {
            "reporting": asdict(verdict.advantage) if verdict.advantage else None,
            "choosing": asdict(verdict.chosen_by) if verdict.chosen_by else None,
            "within_two_standard_errors": None if verdict.advantage is None else not verdict.advantage.is_clear,
        },
        "candidates": [_line_json(line, run.objective) for line in answer.lines],
    }


def _line_json(line: Line, objective: Objective) -> dict[str, Any]:
    content: dict[str, Any] = {"label": line.plan.label, "plan": line.plan.to_json(), "predicted": None}
    if one := line.predicted:
        figures = {"utility": one.utility, "sd": one.sd, "interval": list(one.interval)}
        content["predicted"] = figures | {"by_task": one.predicted}
    if line.measured is None:
        return content | {"infeasible": line.reason}
    for name, items in (("choosing", line.measured.choosing), ("reporting", line.measured.reporting)):
        by_task = {
            task: asdict(objective_estimate({task: values}, Objective("mean"))) for task, values in items.items()
        }
        content[name] = asdict(objective_estimate(items, objective)) | {"by_task": by_task}
    return content
