"""Plans of three and more checkpoints: does the plan with the highest prediction beat simple rules?

Candidates are the labelled plans of one subset and one weighting, a *group*. Every policy picks one of them, or several
whose measured utilities are averaged. Predictions come from a selector that was trained on pairs of other bases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.plans.plan import WEIGHTINGS, MergePlan, fold_plan
from simmerge_ray.research.study.gains import NUM_RESAMPLES, percentile_interval
from simmerge_ray.research.study.merges import ordered_by_utility
from simmerge_ray.search.labels import LabeledPlan, Measured, single_items

MIN_RANGE = 0.1  # of a task's best checkpoint over the base; below it the task is missing in the pooled utility
PREDICTED = "predicted"
EQUAL_LINEAR = "equal-weight linear"
ORACLE = "best of the candidates"

Utilities = Mapping[str, Mapping[str, float]]  # task -> checkpoint -> utility
Group = tuple[str, tuple[str, ...], str]  # base, members, weighting


@dataclass(frozen=True)
class MeasuredFold:
    """A labelled plan: its measured utility on every member's own task, and pooled over them.

    pooled: mean over the tasks of `(u - u(base)) / (u(best checkpoint of the catalogue) - u(base))`; NaN where the
    denominator is below `MIN_RANGE` on all of them.
    """

    base: str
    plan: MergePlan
    weighting: str
    by_task: Mapping[str, float]
    pooled: float

    @property
    def group(self) -> Group:
        return self.base, tuple(sorted(self.plan.members)), self.weighting

    @property
    def arm(self) -> str | None:
        return single_arm(self.plan)


def single_arm(plan: MergePlan) -> str | None:
    """The arm of all steps; None where they differ."""
    labels = {step.arm.label for step in plan.steps}
    return labels.pop() if len(labels) == 1 else None


def weighting_of(plan: MergePlan) -> str | None:
    """`equal` or `halving`, as `fold_plan` makes them; None for what is no such fold."""
    members = [plan.steps[0].left, *(step.right for step in plan.steps)] if plan.steps else []
    for weighting in WEIGHTINGS:
        if len(members) > 2 and fold_plan(members, [step.arm for step in plan.steps], weighting).id == plan.id:
            return weighting
    return None


def candidates(labels: Sequence[LabeledPlan], catalogue: Catalogue) -> list[MeasuredFold]:
    """The folds of three and more checkpoints that were measured on all of their members' tasks."""
    assert catalogue.base is not None
    utilities = unmerged_utilities(labels)
    return [
        MeasuredFold(catalogue.base.id, plan, weighting, by_task, pooled_utility(by_task, utilities, catalogue))
        for plan, by_task in measured_merges(labels, catalogue).items()
        if (weighting := weighting_of(plan)) is not None
    ]


def measured_merges(labels: Iterable[LabeledPlan], catalogue: Catalogue) -> dict[MergePlan, dict[str, float]]:
    """Utility by task of every merge that was measured on all of its members' own tasks, in the order of ids."""
    measured: dict[MergePlan, dict[str, float]] = {}
    for label in labels:
        if label.plan.steps and isinstance(label.outcome, Measured):
            measured.setdefault(label.plan, {})[label.task] = label.outcome.utility
    return {
        plan: by_task
        for plan, by_task in sorted(measured.items(), key=lambda item: item[0].id)
        if {catalogue.own_task[member] for member in plan.members} <= set(by_task)
    }


def unmerged_utilities(labels: Iterable[LabeledPlan]) -> dict[str, dict[str, float]]:
    """Utility of every unmerged checkpoint, by task and id."""
    found: dict[str, dict[str, float]] = {}
    for (name, task), items in single_items(labels).items():
        found.setdefault(task, {})[name] = float(items.mean())
    return found


def pooled_utility(by_task: Mapping[str, float], utilities: Utilities, catalogue: Catalogue) -> float:
    """Mean over the tasks of the share of the way from the base to the best checkpoint; NaN where no task counts."""
    assert catalogue.base is not None
    shares = []
    for task, utility in by_task.items():
        low = utilities[task][catalogue.base.id]
        room = max(utilities[task][name] for name in catalogue.ids) - low
        if room >= MIN_RANGE:
            shares.append((utility - low) / room)
    return float(np.mean(shares)) if shares else float("nan")


def choices(
    group: Sequence[MeasuredFold],
    predicted: Mapping[str, float],
    best_fixed: str,
    utilities: Utilities,
    catalogue: Catalogue,
    linear: Sequence[MeasuredFold],
) -> dict[str, list[MeasuredFold]]:
    """What each policy takes of the candidates of a group; the measured utilities of several are averaged.

    Args:
        predicted: score by plan id. best_fixed: arm, chosen on the training bases. linear: the equal-weight linear
            merge of the subset, which stands beside either weighting.
    """
    members, weighting = group[0].plan.members, group[0].weighting
    last = ordered_by_utility(members, catalogue, utilities)
    of_fixed = [fold for fold in group if fold.arm == best_fixed]
    expert_last = [fold for fold in of_fixed if fold.plan.id == fold_plan(last, [fold.plan.steps[0].arm], weighting).id]
    drawn = [fold for fold in group if fold.arm is None]
    found = {
        PREDICTED: [max(group, key=lambda fold: (predicted[fold.plan.id], fold.plan.id))],
        "random plan": drawn,
        "best fixed arm, random order": [fold for fold in of_fixed if fold not in expert_last] or of_fixed,
        "best fixed arm, expert last": expert_last,
        EQUAL_LINEAR: list(linear),
        ORACLE: [max(group, key=lambda fold: (fold.pooled, fold.plan.id))],
    }
    return {name: chosen for name, chosen in found.items() if chosen}


def compare(
    groups: Mapping[Group, Mapping[str, list[MeasuredFold]]],
    utilities: Mapping[str, Utilities],
    own_task: Mapping[str, str | None],
) -> list[dict[str, Any]]:
    """Each policy beside the predicted plan, over the groups that have both.

    Args:
        groups: choices by group. utilities: of the checkpoints of every base. own_task: of every checkpoint.

    Returns:
        rows: policy, num_groups, pooled, difference (predicted minus policy, with a 95 % interval by resampling bases,
        then subsets), degradation and auxiliary gain in per cent of the sums (see `design`: 100 sum(u - u_E) / sum(u_E)
        over the members' own tasks, E the best of the subset, and the same against the mean of the others).
    """
    names = sorted({name for chosen in groups.values() for name in chosen}, key=lambda name: (name != PREDICTED, name))
    rows = []
    for name in names:
        both = [(key, chosen) for key, chosen in sorted(groups.items()) if name in chosen]
        known = [(key, chosen) for key, chosen in both if not np.isnan(_mean(chosen[name]) + _mean(chosen[PREDICTED]))]
        if not known:
            continue
        values = np.array([_mean(chosen[name]) for _, chosen in known])
        ahead = np.array([_mean(chosen[PREDICTED]) for _, chosen in known]) - values
        tasks = [_against_members(key, chosen[name], utilities[key[0]], own_task) for key, chosen in known]
        sums = [np.concatenate(part).sum(0) for part in zip(*tasks, strict=True)]
        of_expert, of_rest = (float(100 * difference / reference) for difference, reference in sums)
        row = {"policy": name, "num_groups": len(known), "pooled": float(values.mean())}
        row |= {"difference": float(ahead.mean()), "interval": resampled_interval(ahead, [key[:2] for key, _ in known])}
        rows.append(row | {"degradation": of_expert, "auxiliary_gain": of_rest})
    return rows


def _mean(chosen: Sequence[MeasuredFold]) -> float:
    return float(np.mean([fold.pooled for fold in chosen]))


def _against_members(
    key: Group, chosen: Sequence[MeasuredFold], utilities: Utilities, own_task: Mapping[str, str | None]
) -> tuple[np.ndarray, np.ndarray]:
    """(T, 2) each: difference and reference, against the best member on each task and the mean of the others."""
    expert, rest = [], []
    for task in sorted({task for name in key[1] if (task := own_task[name])}):
        known = sorted((utilities[task][name] for name in key[1]), reverse=True)
        merged = float(np.mean([fold.by_task[task] for fold in chosen]))
        expert.append((merged - known[0], known[0]))
        rest.append((merged - np.mean(known[1:]), np.mean(known[1:])))
    return np.array(expert), np.array(rest)


def resampled_interval(values: np.ndarray, units: Sequence[tuple[str, tuple[str, ...]]]) -> list[float]:
    """95 % interval of the mean by drawing bases, then subsets of each (`units` of the values), with replacement."""
    generator = np.random.default_rng(0)
    by_base: dict[str, dict[tuple[str, ...], list[float]]] = {}
    for value, (base, subset) in zip(values, units, strict=True):
        by_base.setdefault(base, {}).setdefault(subset, []).append(float(value))
    sums = [np.array([(sum(v), len(v)) for v in subsets.values()]) for _, subsets in sorted(by_base.items())]
    drawn = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=NUM_RESAMPLES)
    total = np.zeros((NUM_RESAMPLES, 2))
    for index, of_base in enumerate(sums):
        # A base that is drawn twice has its subsets drawn twice.
        shares = np.full(len(of_base), 1 / len(of_base))
        total += generator.multinomial(drawn[:, index] * len(of_base), shares) @ of_base
    return percentile_interval(total[:, 0] / total[:, 1])


def rank_agreement(group: Sequence[MeasuredFold], predicted: Mapping[str, float]) -> float | None:
    """Kendall's tau of predicted and measured within a group; None where it is not defined."""
    known = [fold for fold in group if not np.isnan(fold.pooled)]
    if len(known) < 3:
        return None
    tau = kendalltau([predicted[fold.plan.id] for fold in known], [fold.pooled for fold in known]).statistic
    return None if np.isnan(tau) else float(tau)
