"""Choices that need no signals: what a selector has to beat."""

from __future__ import annotations

from simmerge_ray.headroom import gap_closed
from simmerge_ray.selector.dataset import SelectionDataset


def best_fixed_arm(dataset: SelectionDataset) -> str:
    """The one arm that closes most of the gap over all contexts; by mean utility where no gap is defined."""
    scores = {arm: gap_closed(dataset.contexts, [arm] * len(dataset.contexts)) for arm in dataset.arms}
    defined = {arm: score for arm, score in scores.items() if score is not None}
    if defined:
        return max(defined, key=lambda arm: defined[arm])
    return dataset.arms[int(dataset.utilities.mean(0).argmax())]


def uniform_gap_closed(dataset: SelectionDataset) -> float | None:
    """Expected GapClosed of an arm drawn at random for every context: the mean over the fixed arms."""
    scores = [gap_closed(dataset.contexts, [arm] * len(dataset.contexts)) for arm in dataset.arms]
    defined = [score for score in scores if score is not None]
    return sum(defined) / len(defined) if defined else None
