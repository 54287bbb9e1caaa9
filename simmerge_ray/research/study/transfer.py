"""Does a selector that was trained on small models choose well on a larger one, without being trained again?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import LabelError
from simmerge_ray.research.study.gains import MergeScoring
from simmerge_ray.selector.assessment.crossval import predict_unseen
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.scoring import GAP_CLOSED, Scoring, keeping_no_parent
from simmerge_ray.selector.data.splits import pairs_of
from simmerge_ray.selector.models.novelty import fit_novelty
from simmerge_ray.selector.models.train import fit_models


def transfer(
    small: SelectionDataset, large: SelectionDataset, config: TrainConfig, base_of: Mapping[str, str]
) -> dict[str, Any]:
    """GapClosed on the large base, one arm per merge.

    `transferred` was trained on all pairs of the small bases. `own` was trained on the large base, each checkpoint left
    out in turn. `abstaining` is `transferred` as the product answers: the best fixed arm of the small bases for a merge
    that is unlike the training data. The best fixed arm is chosen on the small bases, or on the large one; the latter
    on the very merges that it is scored on, which is an advantage.

    Returns:
        gap_closed by policy; gains (policy minus best fixed) with 95 % intervals by resampling checkpoints; share of
        own's gain over the small bases' fixed arm that the transferred selector has, None where own gains nothing;
        unlike: share of the merges for which it abstains.

    Raises:
        LabelError: other arms or features, or GapClosed is nowhere defined on the large base.
    """
    if small.arms != large.arms or small.columns != large.columns:
        raise LabelError("the small and the large bases were labelled with other arms, or have other features")
    merges = MergeScoring.of(large, base_of, config.seed)
    scoring, units = merges.scoring, merges.units
    if scoring.unit != GAP_CLOSED:
        raise LabelError("the checkpoints of the large base differ on no task by enough to measure GapClosed")
    (model,) = fit_models(small, [range(len(small.contexts))], config)
    tasks = [context.task for context in large.contexts]
    fixed = _one_arm(Scoring.of(small.contexts, small.arms).best_fixed(), large.utilities.shape)
    transferred = model.predict(large.features, tasks)[0]
    novelty = fit_novelty(model.standardised(small.features), pairs_of(small.contexts), config.novelty_quantile)
    far = novelty.distances(model.standardised(large.features)) > novelty.limit
    unlike = np.zeros(len(far), dtype=bool)  # (N,): contexts of merges that are far on one of their tasks
    for rows in units:
        unlike[rows] = far[rows].any()
    scores = {
        "transferred": transferred,
        "abstaining": np.where(unlike[:, None], fixed, transferred),
        "own": predict_unseen(large, config),
        "best fixed of the small bases": fixed,
        "best fixed of the large base": _one_arm(scoring.best_fixed(), large.utilities.shape),
    }
    taken = {name: merges.taken(keeping_no_parent(values)) for name, values in scores.items()}
    gains: dict[str, Any] = {}
    for policy in ("transferred", "abstaining", "own"):
        for name in ("best fixed of the small bases", "best fixed of the large base"):
            gained = taken[policy] - taken[name]
            gains[f"{policy} - {name}"] = {"gain": merges.gap_closed(gained), "interval": merges.interval(gained)}
    own = gains["own - best fixed of the small bases"]["gain"]
    share = gains["transferred - best fixed of the small bases"]["gain"] / own if own > 0 else None
    return {
        "gap_closed": {name: merges.gap_closed(values) for name, values in taken.items()},
        "arms": {name: large.arms[int(scores[name][0].argmax())] for name in scores if name.startswith("best fixed")},
        "gains": gains,
        "share": share,
        "unlike": float(np.mean([unlike[rows[0]] for rows in units])),
        "num_merges": len(units),
        "num_defined": len(scoring.rows),
    }


def _one_arm(column: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.tile(np.eye(shape[1])[column], (shape[0], 1))
