"""Which of the measured merges is the best, and is it better than the best checkpoint as it is?

The first half of the items (the even ones) chooses, the other half says what the choice is worth: the best of several
measured values is too high on the items that it was the best on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.errors import LabelError, TaskError
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.search.headroom import NUM_STANDARD_ERRORS
from simmerge_ray.search.objectives import Objective

MIN_ITEMS = 4  # two in each half, or there is no standard error
_CHOOSING, _REPORTING = slice(0, None, 2), slice(1, None, 2)

Items = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ObjectiveEstimate:
    """A value of the objective, or a difference of two, with its standard error."""

    value: float
    se: float

    @property
    def is_clear(self) -> bool:
        """Further from 0 than two standard errors."""
        return abs(self.value) > NUM_STANDARD_ERRORS * self.se


@dataclass(frozen=True)
class Candidate:
    """A merge, or a checkpoint as it is, with the utility of every item by task; the same items for all candidates."""

    plan: MergePlan
    items: Items

    @property
    def choosing(self) -> Items:
        return {task: items[_CHOOSING] for task, items in self.items.items()}

    @property
    def reporting(self) -> Items:
        return {task: items[_REPORTING] for task, items in self.items.items()}


@dataclass(frozen=True)
class Verdict:
    """The decision.

    winner: the best merge if it beats the best single checkpoint on the choosing half, else that checkpoint.
    best_merge, best_single: of their kind on the choosing half; None where none was measured. utility: of the winner,
    on the reporting half. advantage: the merge minus the checkpoint, paired by item, on the reporting half;
    chosen_by: on the choosing half. Both are None without one of the two.
    """

    winner: Candidate
    best_merge: Candidate | None
    best_single: Candidate | None
    utility: ObjectiveEstimate
    advantage: ObjectiveEstimate | None
    chosen_by: ObjectiveEstimate | None

    @property
    def keeps_checkpoint(self) -> bool:
        return self.winner.plan.source is not None


def check_items(task: str, num_items: int) -> None:
    """Refuse a task with too few items to split, by TaskError."""
    if num_items < MIN_ITEMS:
        raise TaskError(
            f"task {task!r} has {num_items} items; {MIN_ITEMS} are the least, since one half chooses and the other "
            "measures"
        )


def choose_winner(candidates: Sequence[Candidate], objective: Objective) -> Verdict:
    """The verdict; among equally good merges (checkpoints) the first, and a checkpoint before an equally good merge.

    Raises:
        LabelError: there is no candidate.
    """
    if not candidates:
        raise LabelError("nothing was measured, so nothing can be chosen")
    best_merge = _best([one for one in candidates if one.plan.is_merge], objective)
    best_single = _best([one for one in candidates if not one.plan.is_merge], objective)
    winner, advantage, chosen_by = best_merge or best_single, None, None
    if best_merge is not None and best_single is not None:
        chosen_by = difference(best_merge.choosing, best_single.choosing, objective)
        winner = best_merge if chosen_by.value > 0 else best_single
        advantage = difference(best_merge.reporting, best_single.reporting, objective)
    assert winner is not None
    utility = objective_estimate(winner.reporting, objective)
    return Verdict(winner, best_merge, best_single, utility, advantage, chosen_by)


def _best(candidates: Sequence[Candidate], objective: Objective) -> Candidate | None:
    return max(candidates, key=lambda one: objective_estimate(one.choosing, objective).value, default=None)


def objective_estimate(items: Items, objective: Objective) -> ObjectiveEstimate:
    """The objective of measured items. Items of one task, and tasks, are taken to be independent."""
    return difference(items, {task: np.zeros(len(values)) for task, values in items.items()}, objective)


def difference(left: Items, right: Items, objective: Objective) -> ObjectiveEstimate:
    """Objective of `left` minus that of `right`, sum_t (a_t x_t - b_t y_t), its error from the pairs of items.

    a and b are the shares of the tasks: those of the objective, or for `worst` all of it on each side's worst task.
    """
    weights = [
        objective.task_weights({task: float(items.mean()) for task, items in side.items()}) for side in (left, right)
    ]
    shares = [{task: one / sum(side.values()) for task, one in side.items()} for side in weights]
    value = variance = 0.0
    for task in left:
        pairs = shares[0].get(task, 0.0) * left[task] - shares[1].get(task, 0.0) * right[task]
        value += float(pairs.mean())
        variance += float(pairs.var(ddof=1)) / len(pairs)
    return ObjectiveEstimate(value, float(np.sqrt(variance)))
