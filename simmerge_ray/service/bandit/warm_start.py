"""From a selector and labels to contexts, and to posteriors that know what the labels say.

The context of a merge is what the networks of the selector's ensemble make of its signals: their encoders' outputs side
by side, divided by the root of their number, and a bias of 1. Hidden units of different networks have nothing to do
with each other, so they are not averaged; both orders of the pair are. The regression is on `r = utility - level`, the
level being the selector's own: offline contrasts and online rewards are the same quantity.

Keeping a parent has one posterior, `keep`, for whichever is kept: the context is that of the order in which the kept
one comes first, so what is learned of one side holds for the other. The level is the pair's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import BanditError
from simmerge_ray.plans.keeping import KEEP, keeps
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.orders import by_order, heads_of
from simmerge_ray.selector.data.scoring import units_of
from simmerge_ray.selector.data.splits import Fold, fold_mean
from simmerge_ray.selector.models.model import FittedModel
from simmerge_ray.selector.models.predictors import MlpPredictor
from simmerge_ray.selector.models.train import fit_models
from simmerge_ray.service.bandit.policy import Noise
from simmerge_ray.service.bandit.posterior import GaussianPosterior

MIN_VARIANCE = 1e-6
COLD_NOISE = Noise(0.01)  # of rewards where no labels tell: a spread of 0.1
COLD_SPREAD = 0.1  # of an arm's weights where nothing is known of it


@dataclass(frozen=True)
class Merges:
    """M merges, each on all of its tasks together.

    rows: of the dataset, by merge. z: (M, d). z_by_order: (M, 2, d), left first and right first. level: (M,),
    predicted. utility: (M, K), measured.
    """

    rows: tuple[tuple[int, ...], ...]
    z: np.ndarray
    z_by_order: np.ndarray
    level: np.ndarray
    utility: np.ndarray


@dataclass(frozen=True)
class EncodedPairs:
    """N pairs, each on a task. z: (N, d). z_by_order: (N, 2, d). level: (N,), the mean over the networks."""

    z: np.ndarray
    z_by_order: np.ndarray
    level: np.ndarray


def contexts_of(model: FittedModel, features: np.ndarray, tasks: Sequence[str] | None) -> EncodedPairs:
    """Of (N, 2, F) features. Without tasks each is unknown. Raises BanditError: a model without an encoder."""
    predictor = model.predictor
    if not isinstance(predictor, MlpPredictor):
        raise BanditError(f"the bandit needs the encoder of an mlp selector; this one is {predictor.kind}")
    of_orders = predictor.encode(model.inputs(features, tasks))
    encoded = of_orders.mean(1)
    heads = [(member.level[0][:, 0], float(member.level[1][0])) for member in predictor.members]
    level = np.mean([encoded[:, i] @ weight + bias for i, (weight, bias) in enumerate(heads)], axis=0)

    def contexts(outputs: np.ndarray) -> np.ndarray:
        """(..., E, hidden) -> (..., d)."""
        flat = outputs.reshape(*outputs.shape[:-2], -1) / np.sqrt(len(predictor.members))
        return np.concatenate([flat, np.ones((*flat.shape[:-1], 1))], axis=-1)

    return EncodedPairs(contexts(encoded), contexts(of_orders), level)


def merges_of(dataset: SelectionDataset, model: FittedModel, rows: Sequence[int]) -> Merges:
    """The merges among the given rows; what a merge has several tasks for is averaged over them."""
    index = list(rows)
    part = dataset.subset(index)
    encoded = contexts_of(model, part.features, part.tasks)
    z, level = encoded.z, encoded.level
    units = units_of(part.contexts, per_merge=True)
    return Merges(
        tuple(tuple(index[row] for row in unit) for unit in units),
        np.array([z[unit].mean(0) for unit in units]).reshape(len(units), z.shape[1]),
        np.array([encoded.z_by_order[unit].mean(0) for unit in units]).reshape(len(units), 2, z.shape[1]),
        np.array([level[unit].mean() for unit in units]),
        np.array([part.utilities[unit].mean(0) for unit in units]).reshape(len(units), len(dataset.arms)),
    )


def out_of_fold_level(
    dataset: SelectionDataset, folds: Sequence[Fold], config: TrainConfig, models: Sequence[FittedModel] | None = None
) -> np.ndarray:
    """(N,) level of every context by a model that was not trained on its checkpoints; NaN where no fold tests it.

    In its training data a model's level is better than it will be online, and contrasts would look too clean.
    models: of the folds, where they are fitted already.
    """
    models = models or fit_models(dataset, [fold.training for fold in folds], config)
    parts = [dataset.subset(fold.tested) for fold in folds]
    levels = [contexts_of(model, one.features, one.tasks).level for model, one in zip(models, parts, strict=True)]
    return fold_mean(folds, levels, len(dataset.contexts))


def warm_posteriors(
    merges: Merges, arms: Sequence[str], level: np.ndarray
) -> tuple[dict[str, GaussianPosterior], Noise]:
    """Posteriors of the arms from merges of which all arms were measured, and the noise that is left. Both kept parents
    of a pair are observations of `keep`.

    level: (M,), out of fold (see `out_of_fold_level`); rows with NaN are left out. Raises BanditError: no other.
    """
    known = np.flatnonzero(~np.isnan(level))
    if not len(known):
        raise BanditError("no merge has a level that was predicted without it: there are too few labels to start from")
    rewards = by_order(merges.utility - level[:, None], keeps(arms))[known]
    prior = GaussianPosterior.prior(merges.z.shape[1])
    posteriors, errors = {}, []
    for head, arm in enumerate(heads_of(arms)):
        z, reward = merges.z[known], rewards[:, 0, head]
        if arm == KEEP:
            z, reward = merges.z_by_order[known].reshape(-1, z.shape[1]), rewards[..., head].ravel()
        posteriors[arm] = prior.fold([(context, float(value)) for context, value in zip(z, reward, strict=True)])
        errors.append(np.square(reward - z @ posteriors[arm].mean).mean())
    return posteriors, Noise(max(float(np.mean(errors)), MIN_VARIANCE))


def cold_ridge(noise: Noise) -> float:
    """Precision of a prior that knows nothing, in units of the noise: weights spread by `COLD_SPREAD`."""
    return noise.variance / COLD_SPREAD**2


def start_from_labels(
    labelled: SelectionDataset,
    model: FittedModel,
    folds: Sequence[Fold],
    config: TrainConfig,
    models: Sequence[FittedModel] | None = None,
) -> tuple[dict[str, GaussianPosterior], Noise]:
    """What the arms of a model start from: posteriors from the labels that it was trained on, level out of fold.
    Raises BanditError as `contexts_of` and `warm_posteriors`.
    """
    merges = merges_of(labelled, model, range(len(labelled.contexts)))
    level = merge_values(out_of_fold_level(labelled, folds, config, models), merges)
    return warm_posteriors(merges, labelled.arms, level)


def merge_values(values: Mapping[int, float] | np.ndarray, merges: Merges) -> np.ndarray:
    """(M,): values of the dataset's rows averaged over each merge."""
    return np.array([np.mean([values[row] for row in unit]) for unit in merges.rows])
