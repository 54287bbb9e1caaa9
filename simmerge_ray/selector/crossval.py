"""Predictions for checkpoints that a selector has not seen: one fold per checkpoint, all its pairs left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from simmerge_ray.config import TrainConfig
from simmerge_ray.errors import InputError
from simmerge_ray.headroom import headroom, policy_gain
from simmerge_ray.selector.baselines import best_fixed_arm, uniform_gap_closed
from simmerge_ray.selector.dataset import SelectionDataset
from simmerge_ray.selector.train import train_selector


@dataclass(frozen=True)
class UnseenPredictions:
    """Out-of-fold results for the N contexts of a dataset.

    utility: (N, K) predictions; a pair is tested in the folds of both its checkpoints and the two are averaged.
    best_fixed: for each context the arm that is best fixed on the training part of its folds (on both: of the first).
    """

    utility: np.ndarray
    best_fixed: tuple[str, ...]


def predict_unseen(
    dataset: SelectionDataset, config: TrainConfig, report: Callable[[int, int], None] | None = None
) -> UnseenPredictions:
    """Leave each checkpoint out in turn, train on the pairs without it, predict the pairs with it.

    Raises:
        LabelError: a fold is too small to train on.
    """
    checkpoints = sorted({name for context in dataset.contexts for name in (context.left, context.right)})
    total = np.zeros_like(dataset.utilities)
    fixed: list[str | None] = [None] * len(dataset.contexts)
    for done, left_out in enumerate(checkpoints, 1):
        tested = [i for i, c in enumerate(dataset.contexts) if left_out in (c.left, c.right)]
        training = dataset.subset([i for i in range(len(dataset.contexts)) if i not in set(tested)])
        selector = train_selector(training, config)
        total[tested] += selector.predict(dataset.features[tested])[0]
        fold_fixed = best_fixed_arm(training)
        for row in tested:
            fixed[row] = fixed[row] or fold_fixed
        if report:
            report(done, len(checkpoints))
    return UnseenPredictions(total / 2.0, tuple(arm or dataset.arms[0] for arm in fixed))


def picks_per_context(dataset: SelectionDataset, utility: np.ndarray) -> list[str]:
    """The best predicted arm of every context."""
    return [dataset.arms[k] for k in utility.argmax(1)]


def picks_per_merge(dataset: SelectionDataset, utility: np.ndarray) -> list[str]:
    """One arm per pair: the best by predicted utility averaged over the pair's tasks. The headline objective."""
    rows_of: dict[tuple[str, str], list[int]] = {}
    for row, context in enumerate(dataset.contexts):
        rows_of.setdefault((context.left, context.right), []).append(row)
    picks = [""] * len(dataset.contexts)
    for rows in rows_of.values():
        arm = dataset.arms[int(utility[rows].mean(0).argmax())]
        for row in rows:
            picks[row] = arm
    return picks


def crossval_report(
    dataset: SelectionDataset, config: TrainConfig, report: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """GapClosed of selector, best fixed, uniform and split-half oracle on checkpoints not trained on, as plain JSON.

    `per_merge` (the headline: one arm per pair for both parents' tasks) and `per_context` (an arm per task);
    `predictions` has one row per context. A `reason` instead where there are too few labels for the folds, or
    GapClosed is nowhere defined.
    """
    result: dict[str, Any] = {"arms": list(dataset.arms), "num_contexts": len(dataset.contexts)}
    try:
        room = headroom(dataset.contexts)
        unseen = predict_unseen(dataset, config, report)
    except InputError as error:
        return result | {"reason": str(error)}
    for name, picks in {"per_merge": picks_per_merge, "per_context": picks_per_context}.items():
        gain = policy_gain(dataset.contexts, picks(dataset, unseen.utility), unseen.best_fixed)
        result[name] = {
            "selector": gain.policy,
            "best_fixed": gain.reference,
            "gain": gain.gain,
            "gain_interval": list(gain.gain_interval) if gain.gain_interval else None,
            "uniform": uniform_gap_closed(dataset),
            "oracle": getattr(room, name).split_half_oracle,
        }
    result["predictions"] = [
        {
            "left": context.left,
            "right": context.right,
            "task": context.task,
            "predicted": unseen.utility[row].tolist(),
            "measured": dataset.utilities[row].tolist(),
            "best_fixed": unseen.best_fixed[row],
        }
        for row, context in enumerate(dataset.contexts)
    ]
    return result | {"num_defined": room.num_defined, "min_items": room.min_items}
