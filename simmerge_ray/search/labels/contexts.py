"""Labels as contexts: what was measured of both parents and of every arm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from simmerge_ray.search.evaluation.answers import PREFIX
from simmerge_ray.search.headroom import Context
from simmerge_ray.search.labels.outcomes import LabeledPlan, Measured, check_comparable


def single_items(labels: Iterable[LabeledPlan]) -> dict[tuple[str, str], np.ndarray]:
    """Per-item utilities of unmerged checkpoints by (checkpoint id, task)."""
    return {
        (label.plan.source, label.task): label.outcome.items
        for label in labels
        if label.plan.source is not None and isinstance(label.outcome, Measured)
    }


def measures_arm(label: LabeledPlan) -> bool:
    """Whether it measures an arm on a pair: by a step, or by the recipe that is the same merge. What a merge keeps of
    somebody's answers is no utility."""
    of_answers = label.task.startswith(PREFIX)
    return isinstance(label.outcome, Measured) and label.plan.pair_arm is not None and not of_answers


def pair_contexts(labels: Sequence[LabeledPlan], arms: Sequence[str]) -> list[Context]:
    """Contexts (pair, task) in which every one of `arms` and both parents were measured, sorted.

    An arm is measured by its plan with equal weights, or by the recipe that is that plan (`MergePlan.pair_arm`); what a
    search tries beside that does not stand for it.

    Raises:
        LabelError: two labels disagree on the items, evaluator or settings, so they must not be compared.
    """
    labels = [label for label in labels if not label.task.startswith(PREFIX)]
    check_comparable(labels)
    singles = single_items(labels)
    found: dict[tuple[str, str, str], dict[str, np.ndarray]] = {}
    for label in labels:
        if isinstance(label.outcome, Measured) and (arm := label.plan.pair_arm) is not None:
            left, right = sorted(label.plan.members)
            found.setdefault((left, right, label.task), {})[arm.label] = label.outcome.items
    return [
        Context(left, right, task, {arm: items[arm] for arm in arms}, singles[left, task], singles[right, task])
        for (left, right, task), items in sorted(found.items())
        if set(arms) <= items.keys() and {(left, task), (right, task)} <= singles.keys()
    ]
