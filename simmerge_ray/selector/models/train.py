"""Fit a selector and calibrate it on checkpoints that are left out. Seeded; seconds for a few hundred contexts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import LabelError, SelectorError, unknown_name
from simmerge_ray.base.storage import digest_bytes
from simmerge_ray.plans.keeping import KEEP_ARMS, keeps, merge_arms
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.orders import by_order
from simmerge_ray.selector.data.rewards import RewardedMerge, rewards_digest, single_arms, without
from simmerge_ray.selector.data.scoring import Scoring, units_of
from simmerge_ray.selector.data.splits import Fold, checkpoint_folds, fold_mean, pairs_of
from simmerge_ray.selector.data.targets import TrainingSet, level_and_contrasts
from simmerge_ray.selector.models.fit_mlp import fit_mlps
from simmerge_ray.selector.models.fit_sklearn import fit_forest, fit_knn, fit_ridge
from simmerge_ray.selector.models.model import FittedModel, InputScaling, Selector
from simmerge_ray.selector.models.novelty import fit_novelty
from simmerge_ray.selector.models.policy import Intervals, SafeOverride, fit_intervals, fit_override
from simmerge_ray.selector.models.predictors import Predictor

MIN_CONTEXTS = 8

Rows = Sequence[int]
_FITTERS: Mapping[str, Callable[[TrainingSet, TrainConfig], Predictor]] = {
    "ridge": fit_ridge,
    "knn": fit_knn,
    "forest": fit_forest,
}


def _fitted(sets: Sequence[TrainingSet], config: TrainConfig) -> Sequence[Predictor]:
    if config.model == "mlp":
        return fit_mlps(sets, config)
    return [_FITTERS[config.model](one, config) for one in sets]


def train_selector(
    dataset: SelectionDataset,
    config: TrainConfig,
    reference: Sequence[str] | None = None,
    rewards: Sequence[RewardedMerge] = (),
) -> Selector:
    """Fit a model on all contexts, and calibrate it on models that were fitted without some of the checkpoints.

    Every context enters with both orders of its pair, so nothing depends on which checkpoint is called left, nor on the
    order of the contexts: keep(left) and keep(right) are one thing learned, seen from either side. With
    too few checkpoints to leave some out the selector never leaves the best fixed arm and has no intervals.

    Args:
        reference: merge operators whose contrasts sum to zero; None takes all of them. Contexts in which one of them
            was not measured (NaN) are dropped; another arm, keep of a parent among them, is a contrast to their mean,
            learned from the contexts that have it: what the level means does not depend on it.
        rewards: single arms of merges, learned along with the contexts; thresholds and intervals are calibrated on the
            contexts alone.

    Raises:
        LabelError: fewer than `MIN_CONTEXTS` contexts, or fewer than two reference arms.
        SelectorError: the task encoding needs statistics that were not given, or the model cannot learn from rewards.
    """
    merges = merge_arms(dataset.arms)
    names = tuple(reference) if reference is not None else merges
    if unknown := [name for name in names if name not in merges]:
        raise LabelError(unknown_name("reference arm", unknown[0], merges))
    columns = tuple(dataset.arms.index(name) for name in names)
    dataset = dataset.subset(np.flatnonzero(~np.isnan(dataset.utilities[:, columns]).any(1)).tolist())
    check_enough(dataset, len(columns))
    pairs = pairs_of(dataset.contexts)
    fitted = fit_models(dataset, [range(len(pairs))], config, columns, rewards)[0]
    override, intervals = _calibrated(dataset, config, columns, rewards)
    unique = sorted({(min(pair), max(pair)) for pair in pairs})
    order = _canonical(dataset, range(len(pairs)))
    provenance: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "num_contexts": len(pairs),
        "num_pairs": len(unique),
        "tasks": sorted(set(dataset.tasks)),
        "checkpoints": sorted({name for pair in pairs for name in pair}),
        "pairs": [list(pair) for pair in unique],
        "weights": dataset.weights,
        "label_error": dataset.label_error,
        "data_digest": digest_bytes(dataset.features[order].tobytes(), dataset.utilities[order].tobytes()),
    }
    novelty = fit_novelty(
        fitted.standardised(dataset.features[order]), [pairs[row] for row in order], config.novelty_quantile
    )
    if rewards:
        provenance["num_rewards"] = len(rewards)
        provenance["data_digest"] = digest_bytes(provenance["data_digest"].encode(), rewards_digest(rewards).encode())
        # Merges like the rewarded ones are known now; what counts as far stays: rewards from afar must not widen it.
        known = [fitted.standardised(one.features).reshape(-1, len(dataset.columns)) for one in rewards]
        novelty = replace(novelty, rows=np.concatenate([novelty.rows, *known]))
    return Selector(dataset.arms, names, dataset.columns, fitted, override, novelty, intervals, provenance)


def check_enough(dataset: SelectionDataset, num_reference: int) -> None:
    """Refuse data that is too little to train on. Raises LabelError: saying what is needed."""
    if len(dataset.contexts) < MIN_CONTEXTS or num_reference < 2:
        raise LabelError(
            f"{len(dataset.contexts)} contexts with {num_reference} arms are too few to train on; at least "
            f"{MIN_CONTEXTS} contexts and 2 arms are needed: search more pairs"
        )
    if not np.isfinite(dataset.features).all():
        row, _, column = np.argwhere(~np.isfinite(dataset.features))[0]
        context = dataset.contexts[row]
        raise LabelError(
            f"the feature {dataset.columns[column]!r} of {context.left} + {context.right} on {context.task} is "
            "missing; compute the signals again"
        )


def _canonical(dataset: SelectionDataset, rows: Rows) -> list[int]:
    """The rows in the order of their pairs and tasks, so that the order in which labels came plays no part."""
    return sorted(rows, key=lambda row: attrgetter("left", "right", "task")(dataset.contexts[row]))


def fit_models(
    dataset: SelectionDataset,
    parts: Sequence[Rows],
    config: TrainConfig,
    reference: Sequence[int] | None = None,
    rewards: Sequence[RewardedMerge] = (),
) -> list[FittedModel]:
    """One model for each set of rows; scaling and encoding are those of its rows. Networks are trained side by side.

    Args:
        reference: columns of the reference arms; None takes all merge operators. rewards: learned along with the rows,
            except those of merges with a checkpoint that the data set has and the rows leave out.

    Raises:
        SelectorError: there are rewards, and the model is none that can learn from a single arm.
    """
    if rewards and config.model != "mlp":
        raise SelectorError(f"a {config.model} selector cannot learn from rewards of single arms; take the model mlp")
    columns = tuple(range(len(merge_arms(dataset.arms)))) if reference is None else tuple(reference)
    level, contrasts = level_and_contrasts(dataset.utilities, columns)
    keep = keeps(dataset.arms)
    targets = by_order(contrasts, keep)
    pairs = pairs_of(dataset.contexts)
    every = {name for pair in pairs for name in pair}
    scalings, sets = [], []
    for part in parts:
        rows = _canonical(dataset, part)
        contexts = dataset.subset(rows)
        scaling = InputScaling.fit(contexts, config.task_encoding)
        scalings.append(scaling)
        inputs = scaling.inputs(contexts.features, contexts.tasks, contexts.statistics)
        used = without(rewards, every - {name for row in rows for name in pairs[row]})
        told = [scaling.inputs(reward.features, reward.tasks) for reward in used]
        singles = single_arms(used, dataset.arms, told)
        of_rows = pairs_of(contexts.contexts)
        sets.append(TrainingSet(inputs, level[rows], targets[rows], columns, of_rows, singles, keep))
    # Codes of the task are of another width where a part has other tasks; these cannot be trained side by side.
    fitted: dict[int, FittedModel] = {}
    for width in sorted({one.inputs.shape[-1] for one in sets}):
        index = [i for i, one in enumerate(sets) if one.inputs.shape[-1] == width]
        for i, predictor in zip(index, _fitted([sets[i] for i in index], config), strict=True):
            fitted[i] = FittedModel(**vars(scalings[i]), predictor=predictor, keep=keep)
    return [fitted[i] for i in range(len(sets))]


def predict_folds(dataset: SelectionDataset, folds: Sequence[Fold], models: Sequence[FittedModel]) -> list[np.ndarray]:
    """Per fold (num tested, K): predictions of its model for what it tests."""
    return [model.utilities(dataset.subset(fold.tested)) for fold, model in zip(folds, models, strict=True)]


def calibrate(
    dataset: SelectionDataset, folds: Sequence[Fold], predicted: Sequence[np.ndarray], scoring: Scoring | None = None
) -> tuple[SafeOverride, Intervals | None]:
    """When to leave the best fixed arm, and intervals, from the predictions of folds. Their tested rows may leave out
    some of the data set, which then counts for the best fixed arm alone."""
    scoring = scoring or Scoring.of(dataset.contexts, dataset.arms)
    mean = fold_mean(folds, predicted, len(dataset.contexts))
    units = units_of(dataset.contexts, per_merge=True)
    override = fit_override(scoring, dataset.arms, units, pairs_of(dataset.contexts), mean)
    return override, _intervals(dataset, folds, predicted)


def _intervals(dataset: SelectionDataset, folds: Sequence[Fold], predicted: Sequence[np.ndarray]) -> Intervals | None:
    errors = [value - dataset.utilities[list(fold.tested)] for fold, value in zip(folds, predicted, strict=True)]
    return fit_intervals(errors, len({row for fold in folds for row in fold.tested}))


def usable_folds(folds: Sequence[Fold]) -> list[Fold]:
    """Those that test something and have enough to train on."""
    return [fold for fold in folds if fold.tested and len(fold.training) >= MIN_CONTEXTS]


def _calibrated(
    dataset: SelectionDataset, config: TrainConfig, reference: tuple[int, ...], rewards: Sequence[RewardedMerge]
) -> tuple[SafeOverride, Intervals | None]:
    # Labels of later arms are too few for a fixed choice or a threshold: these come from the reference arms, and from
    # the parents, which every context has.
    columns = [*reference, *(k for k, arm in enumerate(dataset.arms) if arm in KEEP_ARMS)]
    arms = tuple(dataset.arms[k] for k in columns)
    known = replace(dataset, arms=arms, utilities=dataset.utilities[:, columns])
    folds = usable_folds(checkpoint_folds(pairs_of(dataset.contexts), config.num_folds, config.seed))
    if not folds:
        scoring = Scoring.of(known.contexts, arms)
        return SafeOverride(arms[scoring.best_fixed()], math.inf, None, None, 0.0, scoring.unit), None
    models = fit_models(dataset, [fold.training for fold in folds], config, reference, rewards)
    predicted = predict_folds(dataset, folds, models)
    override, _ = calibrate(known, folds, [value[:, columns] for value in predicted])
    return override, _intervals(dataset, folds, predicted)
