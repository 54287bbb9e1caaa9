"""What a search found, from its labels: merges in the order of its objective, beside the unmerged checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.search.labels import Measured
from simmerge_ray.search.objectives import MEAN, Objective, pareto_front
from simmerge_ray.search.setup import PreparedSearch
from simmerge_ray.search.winner import MIN_ITEMS, Candidate, Items, Verdict, choose_winner


@dataclass(frozen=True)
class ComparedMerges:
    """Merges and checkpoints on the same tasks, and what to do. verdict: None where a task has too few items for one,
    or nothing was measured of one kind."""

    tasks: tuple[str, ...]
    objective: Objective
    verdict: Verdict | None


@dataclass(frozen=True)
class PlanResult:
    """A merge or a checkpoint with its utility and standard error by task, and the value of every objective.

    best: the first by the first objective, or with several objectives one of the Pareto front, among its kind.
    """

    plan: MergePlan
    utilities: Mapping[str, tuple[float, float]]
    values: tuple[float, ...]
    items: Items
    best: bool = False


def ranked_results(search: PreparedSearch) -> tuple[list[PlanResult], list[PlanResult]]:
    """(merges, unmerged checkpoints) that were measured on all tasks that the objectives need, best first.

    In a grid, where a merge is measured on its members' tasks, the objectives are those of its own tasks.
    """
    kinds: tuple[list[PlanResult], list[PlanResult]] = ([], [])
    for plan, labels in search.labels().items():
        outcomes = {task: labels[task].outcome for task in search.tasks_of(plan) if task in labels}
        measured = {task: one for task, one in outcomes.items() if isinstance(one, Measured)}
        if len(measured) == len(search.tasks_of(plan)):
            utilities = {task: (one.utility, one.standard_error) for task, one in measured.items()}
            values = search.values({task: one.utility for task, one in measured.items()})
            items = {task: one.items for task, one in measured.items()}
            kinds[plan.source is not None].append(PlanResult(plan, utilities, values, items))
    merges, singles = (_ranked(kind) for kind in kinds)
    return merges, singles


def comparisons(
    search: PreparedSearch, merges: Sequence[PlanResult], singles: Sequence[PlanResult]
) -> list[ComparedMerges]:
    """Of merges with the checkpoints as they are, the base among them, on the same tasks: one for each objective of a
    search, and for each set of tasks that merges of a grid were measured on."""
    base = search.catalogue.base.id if search.catalogue.base else None
    if search.space is not None:
        asked = [(objective.tasks or tuple(sorted(search.tasks)), objective) for objective in search.objectives]
    else:
        asked = [(tasks, Objective(MEAN)) for tasks in dict.fromkeys(tuple(sorted(one.utilities)) for one in merges)]
    return [
        ComparedMerges(tasks, objective, _verdict((*merges, *singles), tasks, objective, base))
        for tasks, objective in asked
    ]


def _verdict(
    results: Iterable[PlanResult], tasks: tuple[str, ...], objective: Objective, base: str | None
) -> Verdict | None:
    # A merge of a grid that was measured on more tasks than these is compared there.
    same = [
        Candidate(one.plan, {task: one.items[task] for task in tasks})
        for one in results
        if set(tasks) <= set(one.items) and (not one.plan.is_merge or set(tasks) == set(one.items) or objective.tasks)
    ]
    if not same or min(len(items) for one in same for items in one.items.values()) < MIN_ITEMS:
        return None
    return choose_winner(same, objective, base)


def _ranked(kind: list[PlanResult]) -> list[PlanResult]:
    if not kind:
        return []
    front = set(pareto_front([one.values for one in kind]))
    if len(kind[0].values) == 1:
        front = {min(front)}
    marked = [replace(one, best=index in front) for index, one in enumerate(kind)]
    return sorted(marked, key=lambda one: (*(-value for value in one.values), one.plan.id))
