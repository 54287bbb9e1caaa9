"""Which of the measured merges is the best, and is it better than the best checkpoint as it is, the base among them?

The first half of the items (the even ones) chooses, the other half says what the choice is worth: the best of several
measured values is too high on the items that it was the best on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.errors import LabelError, TaskError
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.search.headroom import NUM_STANDARD_ERRORS
from simmerge_ray.search.objectives import MEAN, Objective

MIN_ITEMS = 4  # two in each half, or there is no standard error
_SAME = 1e-12  # two sums of the same items
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
    chosen_by: on the choosing half. Both are None without one of the two. base: as it is, where it was measured.
    num_equal: other merges that are as good as the best one on the choosing half. preferred: which of them was taken.
    """

    objective: Objective

    winner: Candidate
    best_merge: Candidate | None
    best_single: Candidate | None
    utility: ObjectiveEstimate
    advantage: ObjectiveEstimate | None
    chosen_by: ObjectiveEstimate | None
    base: Candidate | None = None
    num_equal: int = 0
    preferred: str = ""

    @property
    def keeps_checkpoint(self) -> bool:
        return self.winner.plan.source is not None

    @property
    def answer(self) -> str:
        """`merge X`, `keep Y`, or `do not merge` where the base as it is is the best."""
        label = self.winner.plan.label
        if not self.keeps_checkpoint:
            return f"merge {label}"
        return keep_text(label, self.base is not None and self.winner.plan.id == self.base.plan.id)

    def lines(self) -> list[str]:
        """In words: the answer first, then against what, and where it is bad. All on the same items."""
        sizes = [len(items) for items in self.winner.reporting.values()]
        on = "-".join(map(str, sorted({min(sizes), max(sizes)})))
        answer = f"answer: {self.answer}, {_with_error(self.utility)} on {on} items of each task"
        if self.best_merge is None:
            lines = [f"{answer}: no merge could be measured"]
        elif self.best_single is None:
            lines = [f"{answer}; no checkpoint could be measured beside it"]
        elif self.keeps_checkpoint:
            lines = [f"{answer}: no measured merge beats it"]
            lines.append(f"the best merge, {self.best_merge.plan.label}, against it: {self._advantage_text}")
        else:
            lines = [answer]
            lines.append(f"against the best checkpoint, {self.best_single.plan.label}: {self._advantage_text}")
        if self.num_equal and not self.keeps_checkpoint:
            others = "merge is" if self.num_equal == 1 else "merges are"
            lines.append(f"{self.num_equal} other {others} as good on the half that chose; taken is {self.preferred}")
        said = [one.plan.id for one in (self.winner, None if self.keeps_checkpoint else self.best_single) if one]
        if self.base is not None and self.base.plan.id not in said:
            utility = objective_estimate(self.base.reporting, self.objective)
            lines.append(f"the base, {self.base.plan.label}, on the same items: {_with_error(utility)}")
        return lines + list(self._weak_tasks())

    @property
    def _advantage_text(self) -> str:
        assert self.advantage is not None and self.chosen_by is not None
        text = f"{_signed(self.advantage)} ({_signed(self.chosen_by)} on the half that chose), "
        within = "within two paired standard errors: these items do not tell the two apart"
        text += "more than two paired standard errors" if self.advantage.is_clear else within
        disagree = self.advantage.value * self.chosen_by.value < 0
        return text + ("; the halves disagree which is better, so take more items" if disagree else "")

    def _weak_tasks(self) -> Iterator[str]:
        """Tasks that a mean hides: the answer has 0 there, or clearly less than the base."""
        for task, items in self.winner.items.items():
            if not items.any():
                yield f"warning: the answer has 0 on {task}: it solves none of its {len(items)} items"
            elif self.base is not None:
                lost = difference({task: items}, {task: self.base.items[task]}, Objective(MEAN))
                if lost.value < 0 and lost.is_clear:
                    yield f"warning: on {task} the answer is worse than the base: {_signed(lost)}"


def keep_text(checkpoint: str, is_base: bool) -> str:
    """What to do where a checkpoint as it is is the answer."""
    return f"do not merge: keep the base, {checkpoint}, as it is" if is_base else f"keep {checkpoint}"


def _with_error(one: ObjectiveEstimate) -> str:
    return f"{one.value:.3f} ± {one.se:.3f}"


def _signed(one: ObjectiveEstimate) -> str:
    return f"{one.value:+.3f} ± {one.se:.3f}"


def check_items(task: str, num_items: int) -> None:
    """Refuse a task with too few items to split, by TaskError."""
    if num_items < MIN_ITEMS:
        raise TaskError(
            f"task {task!r} has {num_items} items; {MIN_ITEMS} are the least, since one half chooses and the other "
            "measures"
        )


def choose_winner(
    candidates: Sequence[Candidate],
    objective: Objective,
    base: str | None = None,
    preferred: str = "the one measured first",
) -> Verdict:
    """The verdict; among equally good merges (checkpoints) the first, and a checkpoint before an equally good merge.

    Args:
        candidates: the base as it is among them, where it was measured. base: its id. preferred: what the first of
            equally good merges is, for the verdict's words.

    Raises:
        LabelError: there is no candidate.
    """
    if not candidates:
        raise LabelError("nothing was measured, so nothing can be chosen")
    merges = _best([one for one in candidates if one.plan.is_merge], objective)
    singles = _best([one for one in candidates if not one.plan.is_merge], objective)
    best_merge, best_single = (next(iter(equal), None) for equal in (merges, singles))
    winner, advantage, chosen_by = best_merge or best_single, None, None
    if best_merge is not None and best_single is not None:
        chosen_by = difference(best_merge.choosing, best_single.choosing, objective)
        winner = best_merge if chosen_by.value > 0 else best_single
        advantage = difference(best_merge.reporting, best_single.reporting, objective)
    assert winner is not None
    utility = objective_estimate(winner.reporting, objective)
    of_base = next((one for one in candidates if base is not None and one.plan.source == base), None)
    others = max(0, len(merges) - 1)
    return Verdict(
        objective, winner, best_merge, best_single, utility, advantage, chosen_by, of_base, others, preferred
    )


def _best(candidates: Sequence[Candidate], objective: Objective) -> list[Candidate]:
    """Those with the highest objective on the choosing half, in the given order."""
    values = [objective_estimate(one.choosing, objective).value for one in candidates]
    return [one for one, value in zip(candidates, values, strict=True) if value > max(values) - _SAME]


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
