"""An operator that comes later: how many labels does it need on a frozen encoder?

The selector is trained on the reference arms. The later arm gets a linear head of its own on the encoder's output,
fitted by ridge regression to its contrast on a few labelled contexts; nothing else is trained again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import LabelError, unknown_name
from simmerge_ray.research.study.gains import MergeScoring
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.scoring import keeping_no_parent, shares_of
from simmerge_ray.selector.data.splits import Fold, fold_mean
from simmerge_ray.selector.data.targets import level_and_contrasts
from simmerge_ray.selector.models.predictors import MlpPredictor
from simmerge_ray.selector.models.train import fit_models

PENALTY = 10.0  # on standardised outputs: at this many labels a single slope is shrunk to a half


def later_arm(
    dataset: SelectionDataset,
    arm: str,
    folds: Sequence[Fold],
    config: TrainConfig,
    base_of: Mapping[str, str] | None = None,
    counts: Sequence[int] = (0, 10, 30, 100),
    num_draws: int = 10,
) -> list[dict[str, Any]]:
    """What a selector gains by `arm`, labelled on some contexts of the training part of each fold.

    Args:
        dataset: with the reference arms and `arm`, all measured. counts: of labelled contexts. num_draws: sets of
            labelled contexts that are drawn at random; the choices are averaged over them.

    Returns:
        rows: num_labels ("all" for the whole training part), gap_closed, gain over the selector without the arm with a
        95 % interval, share of merges in which the arm is chosen.

    Raises:
        LabelError: the dataset does not have the arm.
    """
    if arm not in dataset.arms:
        raise LabelError(unknown_name("arm", arm, dataset.arms))
    merges = MergeScoring.of(dataset, base_of, config.seed)
    selector = _FrozenSelector.fitted(dataset, arm, folds, config)

    def shares(num_labels: int | None, draw: int) -> np.ndarray:
        """(N, K + 3)."""
        return shares_of(keeping_no_parent(selector.scores(num_labels, draw)), merges.units)

    without = merges.scoring.taken(shares(0, 0))
    rows = []
    for num_labels in (*counts, None):
        draws = 1 if num_labels in (0, None) else num_draws
        mean_shares = np.mean([shares(num_labels, draw) for draw in range(draws)], axis=0)
        taken = merges.scoring.taken(mean_shares)
        rows.append(
            {
                "num_labels": "all" if num_labels is None else num_labels,
                "gap_closed": merges.gap_closed(taken),
                "gain": merges.gap_closed(taken - without),
                "gain_interval": merges.interval(taken - without),
                "chosen": float(np.nanmean([mean_shares[unit[0], selector.place] for unit in merges.units])),
            }
        )
    return rows


@dataclass(frozen=True)
class _FrozenSelector:
    """Selectors of the folds that know nothing of one arm, at `place` with its `contrasts` (N,). By fold, encoded:
    (N, E, H), and utilities of the tested rows."""

    folds: Sequence[Fold]
    seed: int
    place: int
    contrasts: np.ndarray
    encoded: Sequence[np.ndarray]
    utilities: Sequence[np.ndarray]

    @staticmethod
    def fitted(dataset: SelectionDataset, arm: str, folds: Sequence[Fold], config: TrainConfig) -> _FrozenSelector:
        place = dataset.arms.index(arm)
        kept = [k for k in range(len(dataset.arms)) if k != place]
        utilities_kept = np.ascontiguousarray(dataset.utilities[:, kept])
        known = replace(dataset, arms=tuple(dataset.arms[k] for k in kept), utilities=utilities_kept)
        _, contrasts = level_and_contrasts(dataset.utilities, kept)
        tasks = [context.task for context in dataset.contexts]
        encoded, utilities = [], []
        for fold, model in zip(folds, fit_models(known, [fold.training for fold in folds], config), strict=True):
            if not isinstance(model.predictor, MlpPredictor):
                raise LabelError(f"a later arm needs the encoder of an mlp selector, not {model.predictor.kind}")
            both_orders = model.predictor.encode(model.inputs(dataset.features, tasks))
            encoded.append(_standardised(both_orders.mean(1), fold.training))
            utilities.append(model.predict(dataset.features[list(fold.tested)], [tasks[row] for row in fold.tested])[0])
        return _FrozenSelector(folds, config.seed, place, contrasts[:, place], encoded, utilities)

    def scores(self, num_labels: int | None, draw: int) -> np.ndarray:
        """(N, K + 1) scores with `num_labels` labels of the arm in each training part; None is all."""
        scores = []
        for number, (fold, z, reference) in enumerate(zip(self.folds, self.encoded, self.utilities, strict=True)):
            tested = list(fold.tested)
            column = np.full(len(tested), -np.inf)
            if num_labels != 0:
                rows = np.array(fold.training)
                if num_labels is not None:
                    rows = np.random.default_rng([self.seed, draw, number]).permutation(rows)[:num_labels]
                column = reference.mean(1) + _head(z[rows], self.contrasts[rows], z[tested])
            scores.append(np.insert(reference, self.place, column, axis=1))
        return fold_mean(self.folds, scores, len(self.contrasts))


def _standardised(z: np.ndarray, training: Sequence[int]) -> np.ndarray:
    """(N, E, H), each output of each network brought to mean 0 and spread 1 over the training rows."""
    mean, spread = z[list(training)].mean(0), z[list(training)].std(0)
    result: np.ndarray = (z - mean) / np.where(spread > 1e-9, spread, 1.0)
    return result


def _head(z: np.ndarray, contrast: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """(n, E, H), (n,) and (m, E, H) -> (m,): ridge regression on each network's output, averaged over the networks. The
    mean contrast is not shrunk, the slopes are: with few labels the arm is about as good everywhere."""
    mean = contrast.mean()
    predicted = []
    for member in range(z.shape[1]):
        x = z[:, member]
        centre = x.mean(0)
        gram = (x - centre).T @ (x - centre) + PENALTY * np.eye(x.shape[1])
        slope = np.linalg.solve(gram, (x - centre).T @ (contrast - mean))
        predicted.append(mean + (asked[:, member] - centre) @ slope)
    result: np.ndarray = np.mean(predicted, axis=0)
    return result
