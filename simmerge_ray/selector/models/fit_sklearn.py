"""Fit ridge, nearest neighbours and forest with scikit-learn; what they need at inference is plain arrays."""

from __future__ import annotations

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.selector.data.splits import checkpoint_folds
from simmerge_ray.selector.data.targets import TrainingSet
from simmerge_ray.selector.models.forest import Trees
from simmerge_ray.selector.models.predictors import ForestPredictor, KnnPredictor, RidgePredictor, squared_distances

_NUM_INNER_FOLDS = 4


def fit_ridge(one: TrainingSet, config: TrainConfig) -> RidgePredictor:
    """Linear level and contrasts on both orders of every pair; their penalties by leaving checkpoints out. That of keep
    has its own: what a parent is over its merges is much larger than what operators differ by."""
    level = _best_penalty(one, one.levels, config)
    contrast = _best_penalty(one, one.contrasts[..., list(one.reference)], config)
    of_keep = _best_penalty(one, one.contrasts[..., -1:], config, ordered=True) if one.keep else contrast
    weights, root, noise = _ridge(one.inputs, one.levels, level)
    coefficients = np.tile(weights, (1, one.num_heads))
    noises = np.zeros(one.num_heads + 1)
    noises[0] = noise[0]
    # The later arms first: each may have fewer rows, and the root that is kept is that of the reference arms.
    for heads in (*([k] for k in one.later), list(one.reference)):
        targets = one.contrasts[..., heads]
        known = ~np.isnan(targets).any((1, 2))
        penalty = of_keep if one.keep and heads == [one.num_heads - 1] else contrast
        weights, contrast_root, noise = _ridge(one.inputs[known], targets[known], penalty)
        coefficients[:, heads] += weights
        noises[[1 + k for k in heads]] = noise
    return RidgePredictor(coefficients, root, contrast_root, noises)


def _ridge(inputs: np.ndarray, targets: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, 2, D), (N, 2, O) -> (D + 1, O) coefficients with the intercept last, (D + 1, D + 1) root of the posterior
    covariance, (O,) noise."""
    from sklearn.linear_model import Ridge

    x, y = _both_orders(inputs, targets)
    if not len(x):
        size = inputs.shape[-1] + 1
        return np.zeros((size, targets.shape[2])), np.zeros((size, size)), np.zeros(targets.shape[2])
    fitted = Ridge(alpha=penalty).fit(x, y)
    coefficients = np.vstack([fitted.coef_.reshape(y.shape[1], -1).T, np.atleast_1d(fitted.intercept_)])
    design = np.hstack([x, np.ones((len(x), 1))])
    orders = inputs.shape[1]  # of one unit
    precision = design.T @ design / orders + penalty / orders * np.diag([*np.ones(x.shape[1]), 1e-6])
    root = np.linalg.inv(np.linalg.cholesky(precision)).T
    return coefficients, root, (y - design @ coefficients).std(0)


def _best_penalty(one: TrainingSet, targets: np.ndarray, config: TrainConfig, ordered: bool = False) -> float:
    """targets: (N, 2, O). ordered: whether they differ between the orders; else the mean over both is predicted."""
    from sklearn.linear_model import Ridge

    errors = np.zeros(len(config.penalties))
    for training, tested in _inner_folds(one, config):
        x, y = _both_orders(one.inputs[training], targets[training])
        asked, truth = one.inputs[tested], targets[tested]
        if not ordered:
            asked, truth = asked.mean(1, keepdims=True), truth[:, :1]
        for index, penalty in enumerate(config.penalties):
            predicted = Ridge(alpha=penalty).fit(x, y).predict(asked.reshape(-1, asked.shape[-1]))
            errors[index] += ((predicted.reshape(truth.shape) - truth) ** 2).sum()
    # The largest of equally good ones: without any fold that is the most careful one.
    return config.penalties[len(errors) - 1 - int(errors[::-1].argmin())]


def fit_knn(one: TrainingSet, config: TrainConfig) -> KnnPredictor:
    """All training rows; the number of neighbours by the error of the contrasts when checkpoints are left out."""
    utilities = one.levels + one.contrasts
    reference = list(one.reference)
    errors = np.zeros(len(config.neighbours))
    for training, tested in _inner_folds(one, config):
        rows, known = _both_orders(one.inputs[training], one.contrasts[training][..., reference])
        flat = one.inputs[tested].reshape(-1, one.inputs.shape[-1])
        order = np.argsort(squared_distances(flat, rows), axis=1, kind="stable")
        for index, count in enumerate(config.neighbours):
            predicted = known[order[:, :count]].mean(1).reshape(len(tested), one.inputs.shape[1], -1).mean(1)
            errors[index] += ((predicted - one.contrasts[tested, 0][:, reference]) ** 2).sum()
    best = config.neighbours[len(errors) - 1 - int(errors[::-1].argmin())]
    inputs, values = _both_orders(one.inputs, utilities)
    num_known = np.maximum((~np.isnan(one.contrasts)).sum((0, 1)), 1)
    mean = one.level.mean() + np.nansum(one.contrasts, axis=(0, 1)) / num_known
    return KnnPredictor(inputs, values, mean, np.array([best]))


def fit_forest(one: TrainingSet, config: TrainConfig) -> ForestPredictor:
    """Forests on both orders of every pair: for the level, the reference contrasts, and each later arm."""
    from sklearn.ensemble import RandomForestRegressor

    def trees(targets: np.ndarray) -> Trees:
        known = ~np.isnan(targets).any((1, 2))
        x, y = _both_orders(one.inputs[known], targets[known])
        forest = RandomForestRegressor(
            config.num_trees, min_samples_leaf=config.min_samples_leaf, max_features=1 / 3, random_state=config.seed
        )
        return Trees.of_sklearn(forest.fit(x, y if y.shape[1] > 1 else y[:, 0]))

    heads = [list(one.reference), *([k] for k in one.later)]
    contrasts = tuple(trees(one.contrasts[..., chosen]) for chosen in heads)
    order = np.argsort([k for chosen in heads for k in chosen])
    return ForestPredictor(trees(one.levels), contrasts, order)


def _both_orders(inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2, D), (N, 2, O) -> (2 N, D), (2 N, O)."""
    return inputs.reshape(-1, inputs.shape[-1]), targets.reshape(-1, targets.shape[-1])


def _inner_folds(one: TrainingSet, config: TrainConfig) -> list[tuple[list[int], list[int]]]:
    folds = checkpoint_folds(one.pairs, _NUM_INNER_FOLDS, config.seed)
    return [(list(fold.training), list(fold.tested)) for fold in folds if fold.training and fold.tested]
