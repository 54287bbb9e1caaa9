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
    """Linear level and contrasts on both orders of every pair; their penalties by leaving checkpoints out."""
    level = _best_penalty(one, one.level[:, None], config)
    contrast = _best_penalty(one, one.contrasts[:, list(one.reference)], config)
    weights, root, noise = _ridge(one.inputs, one.level[:, None], level)
    num_arms = one.contrasts.shape[1]
    coefficients = np.tile(weights, (1, num_arms))
    noises = np.zeros(num_arms + 1)
    noises[0] = noise[0]
    # The later arms first: each may have fewer rows, and the root that is kept is that of the reference arms.
    for columns in (*([k] for k in one.later), list(one.reference)):
        known = ~np.isnan(one.contrasts[:, columns]).any(1)
        weights, contrast_root, noise = _ridge(one.inputs[known], one.contrasts[known][:, columns], contrast)
        coefficients[:, columns] += weights
        noises[[1 + k for k in columns]] = noise
    return RidgePredictor(coefficients, root, contrast_root, noises)


def _ridge(inputs: np.ndarray, targets: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(D + 1, O) coefficients with the intercept last, (D + 1, D + 1) root of the posterior covariance, (O,) noise."""
    from sklearn.linear_model import Ridge

    x, y = _both_orders(inputs, targets)
    if not len(x):
        size = inputs.shape[-1] + 1
        return np.zeros((size, targets.shape[1])), np.zeros((size, size)), np.zeros(targets.shape[1])
    fitted = Ridge(alpha=penalty).fit(x, y)
    coefficients = np.vstack([fitted.coef_.reshape(y.shape[1], -1).T, np.atleast_1d(fitted.intercept_)])
    design = np.hstack([x, np.ones((len(x), 1))])
    orders = inputs.shape[1]  # of one unit
    precision = design.T @ design / orders + penalty / orders * np.diag([*np.ones(x.shape[1]), 1e-6])
    root = np.linalg.inv(np.linalg.cholesky(precision)).T
    return coefficients, root, (y - design @ coefficients).std(0)


def _best_penalty(one: TrainingSet, targets: np.ndarray, config: TrainConfig) -> float:
    from sklearn.linear_model import Ridge

    errors = np.zeros(len(config.penalties))
    for training, tested in _inner_folds(one, config):
        x, y = _both_orders(one.inputs[training], targets[training])
        for index, penalty in enumerate(config.penalties):
            predicted = Ridge(alpha=penalty).fit(x, y).predict(one.inputs[tested].mean(1))
            errors[index] += ((predicted.reshape(len(tested), -1) - targets[tested]) ** 2).sum()
    # The largest of equally good ones: without any fold that is the most careful one.
    return config.penalties[len(errors) - 1 - int(errors[::-1].argmin())]


def fit_knn(one: TrainingSet, config: TrainConfig) -> KnnPredictor:
    """All training rows; the number of neighbours by the error of the contrasts when checkpoints are left out."""
    utilities = one.level[:, None] + one.contrasts
    reference = list(one.reference)
    errors = np.zeros(len(config.neighbours))
    for training, tested in _inner_folds(one, config):
        rows, known = _both_orders(one.inputs[training], one.contrasts[training][:, reference])
        flat = one.inputs[tested].reshape(-1, one.inputs.shape[-1])
        order = np.argsort(squared_distances(flat, rows), axis=1, kind="stable")
        for index, count in enumerate(config.neighbours):
            predicted = known[order[:, :count]].mean(1).reshape(len(tested), one.inputs.shape[1], -1).mean(1)
            errors[index] += ((predicted - one.contrasts[tested][:, reference]) ** 2).sum()
    best = config.neighbours[len(errors) - 1 - int(errors[::-1].argmin())]
    inputs, values = _both_orders(one.inputs, utilities)
    num_known = np.maximum((~np.isnan(one.contrasts)).sum(0), 1)
    mean = one.level.mean() + np.nansum(one.contrasts, axis=0) / num_known
    return KnnPredictor(inputs, values, mean, np.array([best]))


def fit_forest(one: TrainingSet, config: TrainConfig) -> ForestPredictor:
    """Forests on both orders of every pair: for the level, the reference contrasts, and each later arm."""
    from sklearn.ensemble import RandomForestRegressor

    def trees(targets: np.ndarray) -> Trees:
        known = ~np.isnan(targets).any(1)
        x, y = _both_orders(one.inputs[known], targets[known])
        forest = RandomForestRegressor(
            config.num_trees, min_samples_leaf=config.min_samples_leaf, max_features=1 / 3, random_state=config.seed
        )
        return Trees.of_sklearn(forest.fit(x, y if y.shape[1] > 1 else y[:, 0]))

    columns = [list(one.reference), *([k] for k in one.later)]
    contrasts = tuple(trees(one.contrasts[:, chosen]) for chosen in columns)
    order = np.argsort([k for chosen in columns for k in chosen])
    return ForestPredictor(trees(one.level[:, None]), contrasts, order)


def _both_orders(inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2, D), (N, O) -> (2 N, D), (2 N, O); with one order as it is."""
    return inputs.reshape(-1, inputs.shape[-1]), np.repeat(targets, inputs.shape[1], axis=0)


def _inner_folds(one: TrainingSet, config: TrainConfig) -> list[tuple[list[int], list[int]]]:
    folds = checkpoint_folds(one.pairs, _NUM_INNER_FOLDS, config.seed)
    return [(list(fold.training), list(fold.tested)) for fold in folds if fold.training and fold.tested]
