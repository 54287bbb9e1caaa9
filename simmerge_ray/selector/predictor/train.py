"""Fit the predictor and calibrate it on what is left out. Seeded; the order of the rows plays no part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import LabelError
from simmerge_ray.base.storage import digest_bytes
from simmerge_ray.selector.data.splits import Fold, checkpoint_folds, fold_mean
from simmerge_ray.selector.data.targets import TrainingSet
from simmerge_ray.selector.models.fit_mlp import fit_mlps
from simmerge_ray.selector.models.fit_sklearn import fit_forest, fit_knn, fit_ridge
from simmerge_ray.selector.models.novelty import fit_novelty
from simmerge_ray.selector.models.policy import fit_intervals, widest
from simmerge_ray.selector.models.predictors import Predictor
from simmerge_ray.selector.predictor.model import FittedRows, UtilityPredictor, standardised
from simmerge_ray.selector.predictor.rows import CandidateRows
from simmerge_ray.selector.predictor.signals import COLUMNS

MIN_ROWS = 32
_NOVELTY_ROWS = 256  # of the training that are kept
_FITTERS: Mapping[str, Callable[[TrainingSet, TrainConfig], Predictor]] = {
    "ridge": fit_ridge, "knn": fit_knn, "forest": fit_forest, "mlp": lambda one, config: fit_mlps([one], config)[0],
}  # fmt: skip


def fit_rows(rows: CandidateRows, config: TrainConfig) -> FittedRows:
    """One model of all rows, by `config.model`."""
    rows = rows.subset(rows.order)
    centre, scale = rows.features.mean(0), rows.features.std(0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    nothing = np.zeros((len(rows.utility), 1, 1))  # a single output: no contrasts
    inputs = standardised(rows.features, centre, scale)
    one = TrainingSet(inputs, rows.utility, nothing, (0,), tuple(_groups(rows)))
    return FittedRows(centre, scale, _FITTERS[config.model](one, config))


def member_folds(rows: CandidateRows, config: TrainConfig) -> list[Fold]:
    """Each group of checkpoints left out in turn with all their merges, where enough is left to train on."""
    folds = checkpoint_folds(_groups(rows), config.num_folds, config.seed)
    return [fold for fold in folds if fold.tested and len(fold.training) >= MIN_ROWS]


def unseen_utilities(rows: CandidateRows, folds: Sequence[Fold], config: TrainConfig) -> np.ndarray:
    """(N,): each row by models that were fitted without it, averaged over the folds that tested it; NaN where none
    did."""
    return fold_mean(folds, _tested(rows, folds, config), len(rows.utility))


def train_predictor(rows: CandidateRows, config: TrainConfig) -> UtilityPredictor:
    """Fit on all rows; intervals and metrics from leaving checkpoints out, and bases where there are several (the wider
    of both at each level).

    Raises:
        LabelError: fewer than `MIN_ROWS` rows, or a signal that is no finite number.
    """
    if len(rows.utility) < MIN_ROWS:
        raise LabelError(
            f"{len(rows.utility)} rows of candidates and tasks are too few to train on; at least {MIN_ROWS} are needed"
        )
    if not np.isfinite(rows.features).all():
        row, column = np.argwhere(~np.isfinite(rows.features))[0]
        raise LabelError(f"{COLUMNS[column]} of {rows.plans[row].label} on {rows.tasks[row]} is not a finite number")
    rows = rows.subset(rows.order)
    fitted, folds = fit_rows(rows, config), member_folds(rows, config)
    groups = _groups(rows)
    chosen = _spread(groups, config.seed)
    novelty = fit_novelty(
        fitted.standardised(rows.features[chosen]), [groups[row] for row in chosen], config.novelty_quantile
    )
    # Candidates of the same members are alike: what counts is how many sets of members and tasks there are.
    num_contexts, bases = len(set(zip(groups, rows.tasks, strict=True))), sorted(set(rows.bases))
    tested = {"checkpoints": folds} | ({"bases": rows.base_folds()} if len(bases) > 1 else {})
    metrics, intervals = {}, []
    for what, of in tested.items():
        values = _tested(rows, of, config)
        if of:
            metrics[what] = row_metrics(rows, fold_mean(of, values, len(rows.utility)))
            errors = [(value - rows.utility[list(f.tested)])[:, None] for f, value in zip(of, values, strict=True)]
            intervals.append(fit_intervals(errors, num_contexts))
    provenance: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "num_rows": len(rows.utility),
        "num_candidates": len(set(zip(groups, (plan.id for plan in rows.plans), strict=True))),
        "bases": bases,
        "tasks": sorted(set(rows.tasks)),
        "checkpoints": sorted({name for group in groups for name in group}),
        "left_out": metrics,
        "data_digest": digest_bytes(rows.features.tobytes(), rows.utility.tobytes()),
    }
    return UtilityPredictor(COLUMNS, fitted, novelty, widest(intervals), provenance)


def _tested(rows: CandidateRows, folds: Sequence[Fold], config: TrainConfig) -> list[np.ndarray]:
    return [fit_rows(rows.subset(f.training), config).utility(rows.features[list(f.tested)]) for f in folds]


def _groups(rows: CandidateRows) -> list[tuple[str, ...]]:
    """Members of each row by names that are unique over the bases."""
    return [tuple(f"{base}/{name}" for name in names) for base, names in zip(rows.bases, rows.members, strict=True)]


def _spread(groups: Sequence[tuple[str, ...]], seed: int) -> list[int]:
    """At most `_NOVELTY_ROWS` rows at random: groups have about the same number of rows."""
    count = min(_NOVELTY_ROWS, len(groups))
    return sorted(np.random.default_rng(seed).permutation(len(groups))[:count].tolist())


def row_metrics(rows: CandidateRows, predicted: np.ndarray) -> dict[str, float]:
    """R^2 over all rows, and the mean over (members, task) of Spearman's rank correlation over candidates."""
    from scipy.stats import spearmanr

    known = ~np.isnan(predicted)
    target, found = rows.utility[known], predicted[known]
    of_choice: dict[tuple[Any, ...], list[int]] = {}
    for row in np.flatnonzero(known).tolist():
        of_choice.setdefault((rows.bases[row], rows.members[row], rows.tasks[row]), []).append(row)
    ranks = [
        float(spearmanr(rows.utility[some], predicted[some]).statistic)
        for some in of_choice.values()
        if np.ptp(rows.utility[some]) > 0 and np.ptp(predicted[some]) > 0
    ]
    spread = ((target - target.mean()) ** 2).sum()
    return {
        "r2": round(float(1 - ((found - target) ** 2).sum() / spread), 4) if spread else 0.0,
        "spearman": round(float(np.mean(ranks)), 4) if ranks else 0.0,
        "rmse": round(float(np.sqrt(((found - target) ** 2).mean())), 4),
    }
