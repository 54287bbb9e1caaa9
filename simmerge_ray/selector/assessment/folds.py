"""Cross-validation: the folds of a data set, and the predictions and choices that are compared on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import LabelError
from simmerge_ray.plans.keeping import merge_arms
from simmerge_ray.selector.assessment import baselines
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.scoring import Scoring, option_scores, units_of
from simmerge_ray.selector.data.splits import Fold, checkpoint_folds, fold_mean, pairs_of
from simmerge_ray.selector.models.model import FittedModel
from simmerge_ray.selector.models.novelty import fit_novelty
from simmerge_ray.selector.models.policy import INTERVAL_LEVELS, safe_scores
from simmerge_ray.selector.models.predictors import PREDICTORS
from simmerge_ray.selector.models.train import calibrate, check_enough, fit_models, predict_folds, usable_folds

OBJECTIVES = ("per_merge", "per_context")


@dataclass(frozen=True)
class CrossValidation:
    """A data set, its folds, and what every policy is fitted and scored with."""

    dataset: SelectionDataset
    config: TrainConfig
    folds: list[Fold]
    scoring: Scoring

    @staticmethod
    def of(dataset: SelectionDataset, config: TrainConfig, folds: Sequence[Fold] | None) -> CrossValidation:
        """On the given folds; None leaves checkpoints out. Raises LabelError: a fold is too small to train on, or there
        is nothing to leave out."""
        if folds is None:
            folds = checkpoint_folds(pairs_of(dataset.contexts), config.num_folds, config.seed)
        folds = [fold for fold in folds if fold.tested]
        for fold in folds:
            check_enough(dataset.subset(fold.training), len(merge_arms(dataset.arms)))
        if not folds:
            raise LabelError("there are no contexts to leave out: search more pairs")
        return CrossValidation(dataset, config, list(folds), Scoring.of(dataset.contexts, dataset.arms))

    def models(self, dataset: SelectionDataset, config: TrainConfig) -> list[FittedModel]:
        """One for each fold; the features may differ from those of the cross-validation."""
        return fit_models(dataset, [fold.training for fold in self.folds], config)

    def predictions(self, models: Sequence[FittedModel], dataset: SelectionDataset | None = None) -> list[np.ndarray]:
        return predict_folds(dataset or self.dataset, self.folds, models)

    def unseen(self, dataset: SelectionDataset, config: TrainConfig) -> np.ndarray:
        """(N, K): the averaged predictions of models fitted for it."""
        return self.averaged(self.predictions(self.models(dataset, config), dataset))

    def averaged(self, values: Sequence[np.ndarray]) -> np.ndarray:
        return fold_mean(self.folds, values, len(self.dataset.contexts))

    def best_fixed(self) -> tuple[str, ...]:
        arms, found = self.dataset.arms, dict[int, str]()
        for fold in self.folds:
            best = arms[self.scoring.among(fold.training).best_fixed()]
            found = dict.fromkeys(fold.tested, best) | found
        return tuple(found.get(row, arms[0]) for row in range(len(self.dataset.contexts)))

    def baseline(self, policy: baselines.Policy) -> np.ndarray:
        """(N, A): its scores."""
        return self.averaged([policy(self.dataset, self.scoring, fold.training, fold.tested) for fold in self.folds])

    def rivals(self) -> dict[str, Callable[[], np.ndarray]]:
        """What makes the scores (N, A) of other kinds of models, of the baselines, and of the same model on part of
        the signals and on those of other pairs, by name; each raises LabelError where the labels do not suffice."""
        data, config = self.dataset, self.config

        def model(dataset: Callable[[], SelectionDataset], kind: str = config.model) -> np.ndarray:
            return option_scores(self.unseen(dataset(), config.model_copy(update={"model": kind})), data.arms)

        return {
            **{kind: partial(model, lambda: data, kind) for kind in PREDICTORS if kind != config.model},
            **{name: partial(self.baseline, policy) for name, policy in baselines.BASELINES.items()},
            "single-checkpoint features": partial(model, lambda: baselines.single_checkpoint_features(data)),
            "parents' utilities": partial(model, lambda: baselines.parents_utilities(data)),
            "signals permuted": lambda: option_scores(self.averaged(self._permuted_predictions()), data.arms),
        }

    def _permuted_predictions(self) -> list[np.ndarray]:
        # All folds in one data set, so that networks are trained side by side: rows of fold i start at i * N.
        num, seed, statistics = len(self.dataset.contexts), self.config.seed, self.dataset.statistics
        joined = replace(
            self.dataset,
            contexts=self.dataset.contexts * len(self.folds),
            features=np.concatenate(
                [baselines.permuted_signals(self.dataset, fold.training, seed).features for fold in self.folds]
            ),
            utilities=np.tile(self.dataset.utilities, (len(self.folds), 1)),
            statistics=None if statistics is None else np.tile(statistics, (len(self.folds), 1)),
        )
        parts = [[i * num + row for row in fold.training] for i, fold in enumerate(self.folds)]
        return self.predictions(fit_models(joined, parts, self.config))


def small_config(config: TrainConfig) -> TrainConfig:
    """Smaller ensembles, for many models that are only compared with each other or give a threshold."""
    smaller = {"num_members": min(2, config.num_members), "num_trees": max(1, config.num_trees // 4)}
    return config.model_copy(update=smaller)


def safe_results(
    crossval: CrossValidation, models: Sequence[FittedModel], predicted: Sequence[np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Choose thresholds and intervals inside each fold. models, predicted: of the (outer) folds.

    Returns per objective (N, K) one-hot choices averaged over folds, and figures as JSON: `override`, thresholds per
    fold, None for infinity; `abstained`, share of (fold, pair) too far from the training data; `intervals` per level,
    share of measured utilities inside and mean half-width.
    """
    dataset, config = crossval.dataset, crossval.config
    pairs, arms = pairs_of(dataset.contexts), dataset.arms
    # For every fold the folds inside its training part, of the whole data set's groups of checkpoints.
    every = checkpoint_folds(pairs, config.num_folds, config.seed)
    inner = [usable_folds([one.among(fold.training) for one in every]) for fold in crossval.folds]
    # Leaving out A, then B, is leaving out B, then A: with one checkpoint a fold half of the models are enough.
    distinct = {fold.training: None for folds in inner for fold in folds}
    fitted = fit_models(dataset, list(distinct), small_config(config)) if distinct else []
    model_of = dict(zip(distinct, fitted, strict=True))
    scores: dict[str, list[np.ndarray]] = {name: [] for name in OBJECTIVES}
    thresholds: list[float | None] = []
    distant, inside, widths = [], [], []
    for fold, folds, model, utility in zip(crossval.folds, inner, models, predicted, strict=True):
        inner_predicted = predict_folds(dataset, folds, [model_of[one.training] for one in folds])
        training, tested = list(fold.training), list(fold.tested)
        standardised = model.standardised(dataset.features[training])
        novelty = fit_novelty(standardised, [pairs[i] for i in training], config.novelty_quantile)
        far = novelty.distances(model.standardised(dataset.features[tested])) > novelty.limit
        distant.append(far)
        best = arms[crossval.scoring.among(training).best_fixed()]
        override = found = None
        if folds:
            override, found = calibrate(dataset, folds, inner_predicted, crossval.scoring.among(training))
        thresholds.append(None if override is None or override.never else override.threshold)
        for name in OBJECTIVES:
            chosen = np.tile(np.eye(len(arms))[arms.index(best)], (len(tested), 1))
            for rows in units_of([dataset.contexts[row] for row in tested], name == "per_merge"):
                if override is not None:
                    pooled, known = utility[rows].mean(0)[None], np.array([not far[rows].any()])
                    chosen[rows] = safe_scores(override, arms, pooled, known)
            scores[name].append(chosen)
        if found is not None:
            inside.append(np.abs(utility - dataset.utilities[tested]) <= found.half_widths[:, None])
            widths.append(found.half_widths.mean(1))
    intervals = {}
    if inside:
        figures = zip(
            np.concatenate(inside, axis=1).mean((1, 2)).tolist(), np.mean(widths, axis=0).tolist(), strict=True
        )
        told = [{"coverage": coverage, "half_width": width} for coverage, width in figures]
        intervals = dict(zip(map(str, INTERVAL_LEVELS), told, strict=True))
    return {name: crossval.averaged(values) for name, values in scores.items()}, {
        "override": {"thresholds": thresholds},
        "abstained": float(np.concatenate(distant).mean()),
        "intervals": intervals,
    }
