"""What is lost by choosing among labelled candidates by a score: of the predictor, of the rule without labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.research.pair_sample import PairSample
from simmerge_ray.selector.data.splits import Fold
from simmerge_ray.selector.predictor.rows import CandidateRows
from simmerge_ray.selector.predictor.signals import COLUMNS
from simmerge_ray.selector.predictor.train import member_folds, row_metrics, unseen_utilities

FAMILIES = {"ties": "ties", "norm-matched": "scale_matched_linear"}

Regrets = Mapping[tuple[str, tuple[str, ...]], float]
"""By (base, members)."""


def families_of(rows: CandidateRows) -> np.ndarray:
    """(N,) operator of each row's recipe; empty for a checkpoint as it is."""
    return np.array([plan.arms[0].operator if plan.is_merge else "" for plan in rows.plans])


def rule(rows: CandidateRows) -> np.ndarray:
    """(N,): `aim.worth` of the task's owners, which is `(retention + likelihood) / 2` for one owner a task."""
    return np.asarray(rows.features[:, [COLUMNS.index("retention"), COLUMNS.index("likelihood")]].mean(1))


def regrets(
    rows: CandidateRows, scores: np.ndarray, among: np.ndarray | None = None
) -> dict[tuple[str, tuple[str, ...]], float]:
    """What the candidate with the best mean score loses to the one with the best mean utility.

    among: (N,) bool, the rows of candidates that are chosen among; None for all.
    """
    found = {}
    for choice, plans in rows.choices().items():
        kept = [some for some in plans.values() if among is None or among[some].all()]
        most = max((len(some) for some in kept), default=0)
        kept = [some for some in kept if len(some) == most]
        if len(kept) > 1 and not any(np.isnan(scores[some]).any() for some in kept):
            utility = np.array([rows.utility[some].mean() for some in kept])
            found[choice] = float(utility.max() - utility[int(np.argmax([scores[some].mean() for some in kept]))])
    return found


def regret_interval(found: Regrets) -> dict[str, Any]:
    """`PairSample.mean` over members of bases."""
    pairs = tuple((f"{base}/{members[0]}", f"{base}/{members[-1]}") for base, members in found)
    base_of = {name: name.partition("/")[0] for pair in pairs for name in pair}
    return PairSample(pairs, base_of).mean([*found.values()])


def compared(rows: CandidateRows, predicted: np.ndarray, among: np.ndarray | None = None) -> dict[str, Any]:
    """Regret by the predictor and by the rule on the same sets of members."""
    ours, theirs = regrets(rows, predicted, among), regrets(rows, rule(rows), among)
    theirs = {choice: value for choice, value in theirs.items() if choice in ours}
    difference = {choice: value - theirs[choice] for choice, value in ours.items()}
    return {name: regret_interval(one) for name, one in
            (("predicted", ours), ("rule", theirs), ("predicted minus rule", difference)) if one}  # fmt: skip


def without_family(rows: CandidateRows, family: np.ndarray, config: TrainConfig) -> dict[str, Any]:
    """Checkpoints left out, and besides one family of operators: how the rest tells of it, chooses within it, and
    chooses among all candidates.

    family: (N,) bool, whose rows are in it.
    """
    folds = [
        Fold(fold.name, tuple(row for row in fold.training if not family[row]), fold.tested)
        for fold in member_folds(rows, config)
    ]
    predicted = unseen_utilities(rows, folds, config)
    return row_metrics(rows, np.where(family, predicted, np.nan)) | {
        "regret within": compared(rows, predicted, family),
        "regret among all": compared(rows, predicted),
    }
