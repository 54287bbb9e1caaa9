"""Which checkpoints to merge: in a small catalogue of which every subset is labelled, regret of the first choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from simmerge_ray.base.errors import LabelError
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.research.study.longer import Utilities, measured_merges, single_arm, unmerged_utilities
from simmerge_ray.search.labels import LabeledPlan
from simmerge_ray.signals.table import SignalTable

SIMILARITY = "task_vector_cosine_global"
ANY_SIZE = "any"


@dataclass(frozen=True)
class SubsetMerge:
    """A labelled plan of the small catalogue. relative: measured, see `relative_utility`."""

    plan: MergePlan
    relative: float

    @property
    def subset(self) -> tuple[str, ...]:
        return tuple(sorted(self.plan.members))

    @property
    def arm(self) -> str | None:
        return single_arm(self.plan)


def labelled_choices(
    labels: Sequence[LabeledPlan], catalogue: Catalogue, members: Sequence[str], arms: Sequence[str]
) -> list[SubsetMerge]:
    """The merges among `members` by the given arms that were measured on all of their own tasks; LabelError if a subset
    of two or more has none."""
    utilities = unmerged_utilities(labels)
    found = [
        SubsetMerge(plan, relative)
        for plan, by_task in measured_merges(labels, catalogue).items()
        if set(plan.members) <= set(members)
        and {step.arm.label for step in plan.steps} <= set(arms)
        and not np.isnan(relative := relative_utility(by_task, utilities, catalogue))
    ]
    known, sizes = {choice.subset for choice in found}, range(2, len(members) + 1)
    for subset in (subset for size in sizes for subset in combinations(sorted(members), size)):
        if subset not in known:
            raise LabelError(f"no merge of {' + '.join(subset)} was measured on all of their tasks")
    return found


def relative_utility(by_task: Mapping[str, float], utilities: Utilities, catalogue: Catalogue) -> float:
    """Mean over the tasks of the share of what the best checkpoint reaches there; NaN where none reaches anything.

    What subsets of different tasks reach is not comparable before. (`longer.pooled_utility`, the share of the way from
    the base, is undefined where the base is as good as its experts, as the first base of the study is.)
    """
    best = {task: max(utilities[task][name] for name in catalogue.ids) for task in by_task}
    shares = [utility / best[task] for task, utility in by_task.items() if best[task] > 0]
    return float(np.mean(shares)) if shares else float("nan")


def relative_prediction(
    by_task: Mapping[str, tuple[float, float]], utilities: Utilities, catalogue: Catalogue
) -> float:
    """Predicted utilities (value, spread) less their spreads, taken relative like measured ones."""
    return relative_utility({task: u - sd for task, (u, sd) in by_task.items()}, utilities, catalogue)


def compare_subsets(
    choices: Sequence[SubsetMerge],
    predicted: Mapping[str, float],
    best_fixed: str,
    table: SignalTable,
    utilities: Utilities,
    catalogue: Catalogue,
) -> list[dict[str, Any]]:
    """Regret at 1 of every policy, for each size and for any size.

    Policies: the plan with the highest prediction; its subset by the best fixed arm; any plan (the mean); the subset
    that is most similar (mean cosine of the task vectors of its pairs) and the checkpoints that are individually best
    (mean relative utility on all tasks), both by the best fixed arm.

    Args:
        predicted: relative prediction by plan id. table: signals of the pairs.

    Returns:
        rows: size, policy, chosen (the subset), relative, regret.
    """
    rows = []
    sizes = sorted({len(choice.subset) for choice in choices})
    names = {name for choice in choices for name in choice.subset}
    individually = {
        name: relative_utility({task: of_task[name] for task, of_task in utilities.items()}, utilities, catalogue)
        for name in names
    }
    for size in [*sizes, None]:
        some = [choice for choice in choices if size is None or len(choice.subset) == size]
        best = max(choice.relative for choice in some)
        first = max(some, key=lambda merge: (predicted[merge.plan.id], merge.plan.id))
        subsets = sorted({choice.subset for choice in some})
        similar = max(subsets, key=lambda subset: (_similarity(table, subset), subset))
        top = max(subsets, key=lambda subset: (np.mean([individually[name] for name in subset]), len(subset), subset))
        policies = {
            "predicted": (first.subset, [first]),
            "predicted subset, best fixed arm": (first.subset, _by_arm(some, first.subset, best_fixed)),
            "any": ((), some),
            "most similar": (similar, _by_arm(some, similar, best_fixed)),
            "individually best": (top, _by_arm(some, top, best_fixed)),
        }
        for name, (subset, taken) in policies.items():
            relative = float(np.mean([choice.relative for choice in taken]))
            row = {"size": ANY_SIZE if size is None else size, "policy": name, "chosen": list(subset)}
            rows.append(row | {"relative": relative, "regret": best - relative})
    return rows


def _by_arm(choices: Sequence[SubsetMerge], subset: tuple[str, ...], arm: str) -> list[SubsetMerge]:
    """The merges of a subset by one arm; all of its merges where that one was not labelled."""
    of_subset = [choice for choice in choices if choice.subset == subset]
    return [choice for choice in of_subset if choice.arm == arm] or of_subset


def _similarity(table: SignalTable, subset: tuple[str, ...]) -> float:
    task = table.tasks[0]  # weights are the same for every task
    return float(np.mean([table.get(a, b, task).features[SIMILARITY] for a, b in combinations(subset, 2)]))
