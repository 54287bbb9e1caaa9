"""What a search found, from its labels: merges in the order of its objective, beside the unmerged checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.search.labels import Measured
from simmerge_ray.search.objectives import pareto_front
from simmerge_ray.search.setup import PreparedSearch


@dataclass(frozen=True)
class PlanResult:
    """A merge or a checkpoint with its utility and standard error by task, and the value of every objective.

    best: the first by the first objective, or with several objectives one of the Pareto front, among its kind.
    """

    plan: MergePlan
    utilities: Mapping[str, tuple[float, float]]
    values: tuple[float, ...]
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
            kinds[plan.source is not None].append(PlanResult(plan, utilities, values))
    merges, singles = (_ranked(kind) for kind in kinds)
    return merges, singles


def _ranked(kind: list[PlanResult]) -> list[PlanResult]:
    if not kind:
        return []
    front = set(pareto_front([one.values for one in kind]))
    if len(kind[0].values) == 1:
        front = {min(front)}
    marked = [replace(one, best=index in front) for index, one in enumerate(kind)]
    return sorted(marked, key=lambda one: (*(-value for value in one.values), one.plan.id))
