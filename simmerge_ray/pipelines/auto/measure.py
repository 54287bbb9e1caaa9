"""The last word of `simmerge auto` where there are labels: the best merges measured beside every checkpoint, and what
labels say of the choice that was made without them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import LabelError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.capacity.engines import waiting_lines
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.pipelines.auto.request import AutoRun, LabelFree
from simmerge_ray.pipelines.dataset import search_bar
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import Recipe, plain_average
from simmerge_ray.search.labels import Infeasible, Measured
from simmerge_ray.search.objectives import Objective, parse_objective
from simmerge_ray.search.setup import PreparedSearch, prepare_search
from simmerge_ray.search.winner import Candidate, Verdict, check_items, choose_winner, objective_estimate
from simmerge_ray.selector.finding.space import kept_checkpoints

_FEWEST_FOR_RANKS = 5
_PAIRS_SHARE = 4  # of the measured merges one in so many is a merge of two members, where there are more
_MOST_MEMBERS = 8  # whose weights are searched together


@dataclass(frozen=True)
class MeasuredLine:
    """One merge or checkpoint: its score without labels (None where it was not run over probes), and what was
    measured, or why it was not."""

    plan: MergePlan
    score: float | None
    measured: Candidate | None
    reason: str | None


@dataclass(frozen=True)
class Measurement:
    """lines: the best of the choosing half first. agreement: Spearman's rank correlation of score and measured
    objective over the `num_ranked` lines that have both; None for too few."""

    lines: tuple[MeasuredLine, ...]
    verdict: Verdict
    objective: Objective
    agreement: float | None
    num_ranked: int


def on_same_tasks(catalogue: Catalogue) -> Catalogue:
    """The catalogue without own tasks: every merge and checkpoint is measured on all tasks that are given."""
    return replace(catalogue, own_task=dict.fromkeys(catalogue.ids))


def prepare_measuring(run: AutoRun) -> PreparedSearch:
    """Raises InputError: tasks or an engine's settings that cannot be used, or an objective that tasks do not have."""
    for name, task in run.tasks.items():
        check_items(name, task.num_items)
    if run.tasks:
        parse_objective(run.request.config.objective, run.tasks)
    return prepare_search(on_same_tasks(run.request.catalogue), run.tasks, run.engine, run.labels)


def measure_stage(run: AutoRun, found: LabelFree, narrator: Narrator) -> Measurement:
    """Measure what is missing, and decide: the better half of the budget goes to the merges that were chosen without
    labels, then come the simple ones (`simple_merges`), and the rest are proposals of CMA-ES around the first of them.

    Raises:
        LabelError: nothing could be measured. EngineError: no evaluator started.
    """
    from simmerge_ray.on_ray.merge_search import run_search

    start = first_measured(found, run.request.catalogue.ids, run.evaluate)
    members = run.request.catalogue.ids
    narrator.print_lines(waiting_lines(prepare_measuring(run)))
    with narrator.stage("measure") as stage:
        with search_bar(narrator) as report:
            catalogue, config = on_same_tasks(run.request.catalogue), _around(run, start)
            if config is None:  # nothing to vary: one member
                plans = [*kept_checkpoints(members, run.request.base), *start]
                result = run_search(catalogue, run.tasks, run.engine, run.labels, plans, report)
            else:
                result = run_search(catalogue, run.tasks, config, run.labels, report=report, start=start)
        stage.result = f"{result.num_trials_run} measured now, by {run.engine.evaluator} -> {run.labels}"
    scores = {one.plan.id: one.score for one in found.finding.ranked}
    scores |= {one.whole.plan.id: one.whole.score for one in found.tuned}
    return _decided(result.search, scores, parse_objective(run.request.config.objective, run.tasks), run.request.base)


def first_measured(found: LabelFree, members: Sequence[str], count: int) -> list[MergePlan]:
    """The merges that are measured before any proposal, at most `count` of them."""
    chosen = {plan.id: plan for plan in found.ranking[: (count + 1) // 2]}
    simple = simple_merges(members, [plan for plan in found.ranking if len(plan.members) == 2], count // _PAIRS_SHARE)
    return list((chosen | {plan.id: plan for plan in simple if plan.id not in chosen}).values())[:count]


def simple_merges(members: Sequence[str], of_pairs: Sequence[MergePlan], num_pairs: int) -> list[MergePlan]:
    """What whoever measures wants to see beside a clever choice: the plain average, the average of task vectors of one
    length, and of more than two members the merges of two of them that look best, else their averages.

    Args:
        of_pairs: merges of two members, the best first. num_pairs: of different pairs, to be taken.
    """
    if len(members) < 2:
        return []
    scale_matched = Recipe(make_arm("scale_matched_linear"), tuple(members), (1.0,) * len(members))
    simple = [MergePlan(recipe=plain_average(members)), MergePlan(recipe=scale_matched)]
    if len(members) == 2:
        return simple
    best: dict[frozenset[str], MergePlan] = {}
    averages = (MergePlan(recipe=plain_average(pair)) for pair in combinations(members, 2))
    for plan in (*of_pairs, *averages):
        best.setdefault(frozenset(plan.members), plan)
    return [*simple, *list(best.values())[:num_pairs]]


def _around(run: AutoRun, start: Sequence[MergePlan]) -> SearchConfig | None:
    """A search of sums of task vectors of all members, or of a large catalogue of the first merge's."""
    members = run.request.catalogue.ids
    if len(members) > _MOST_MEMBERS:
        members = next((plan.members for plan in start if len(plan.members) > 1), members[:2])
    if len(members) < 2:
        return None
    ways = (len(members), len(members))
    space = {"members": members, "ways": ways, "arms": ("task_arithmetic",), "sampler": "cmaes"}
    search = {"budget": run.evaluate, "objectives": (run.request.config.objective,), "shards": 1}
    return run.engine.model_copy(update=space | search)


def _decided(search: PreparedSearch, scores: Mapping[str, float], objective: Objective, base: str) -> Measurement:
    lines = []
    for plan, labels in search.labels().items():
        if set(labels) != set(search.tasks):
            continue
        outcomes = {task: label.outcome for task, label in labels.items()}
        items = {task: one.items for task, one in outcomes.items() if isinstance(one, Measured)}
        reasons = [one.reason for one in outcomes.values() if isinstance(one, Infeasible)]
        measured = Candidate(plan, items) if len(items) == len(search.tasks) else None
        lines.append(MeasuredLine(plan, scores.get(plan.id), measured, reasons[0] if reasons else None))
    lines.sort(key=lambda line: -math.inf if line.score is None else line.score, reverse=True)  # what equal ones go by
    candidates = [line.measured for line in lines if line.measured is not None]
    if not candidates:
        raise LabelError(f"nothing could be measured: {lines[0].reason}; --retry-infeasible tries again")

    def place(line: MeasuredLine) -> float:
        return -objective_estimate(line.measured.choosing, objective).value if line.measured else 1.0

    verdict = choose_winner(candidates, objective, base, "the one with the highest score")
    return Measurement(tuple(sorted(lines, key=place)), verdict, objective, *_agreement(lines, objective))


def _agreement(lines: Sequence[MeasuredLine], objective: Objective) -> tuple[float | None, int]:
    from scipy.stats import spearmanr

    both = [
        (line.score, objective_estimate(line.measured.items, objective).value)
        for line in lines
        if line.score is not None and line.measured is not None
    ]
    if len(both) < _FEWEST_FOR_RANKS or min(len(set(column)) for column in zip(*both, strict=True)) < 2:
        return None, len(both)
    return float(spearmanr(*zip(*both, strict=True)).statistic), len(both)


def measured_json(run: AutoRun, found: Measurement) -> dict[str, Any]:
    """JSON value of what was measured."""
    verdict = found.verdict
    return {
        "measured": {
            "num_items": {name: task.num_items for name, task in run.tasks.items()},
            "halves": "chosen on the even items (0, 2, ...), reported from the odd ones",
            "answer": verdict.answer,
            "lines": verdict.lines(),
            "utility": asdict(verdict.utility),
            "base": asdict(objective_estimate(verdict.base.reporting, found.objective)) if verdict.base else None,
            "best_single": verdict.best_single.plan.label if verdict.best_single else None,
            "best_merge": verdict.best_merge.plan.label if verdict.best_merge else None,
            "merge_minus_single": {
                "reporting": asdict(verdict.advantage) if verdict.advantage else None,
                "choosing": asdict(verdict.chosen_by) if verdict.chosen_by else None,
                "within_two_standard_errors": None if verdict.advantage is None else not verdict.advantage.is_clear,
            },
            "rank_correlation_with_score": found.agreement,
            "num_ranked": found.num_ranked,
            "candidates": [_line_json(line, found.objective) for line in found.lines],
        }
    }


def _line_json(line: MeasuredLine, objective: Objective) -> dict[str, Any]:
    content: dict[str, Any] = {"label": line.plan.label, "plan": line.plan.to_json(), "score": line.score}
    if line.measured is None:
        return content | {"infeasible": line.reason}
    for name, items in (("choosing", line.measured.choosing), ("reporting", line.measured.reporting)):
        by_task = {
            task: asdict(objective_estimate({task: values}, Objective("mean"))) for task, values in items.items()
        }
        content[name] = asdict(objective_estimate(items, objective)) | {"by_task": by_task}
    return content
