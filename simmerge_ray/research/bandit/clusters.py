"""What the bandit's benchmarks are replayed on: merges of an unseen domain, base by base, and intervals over these.

DATASET is what `simmerge train DATASET` reads: a finished `simmerge demo` (one base), or a study of several. For every
domain a selector is trained on all merges without a checkpoint of it, of all bases; the merges with one are then asked
about. A cluster is a base with an unseen domain; intervals resample bases, and domains within each base that is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.storage import Place
from simmerge_ray.reports.figures import new_figure, save_figure
from simmerge_ray.research.bandit.replay import Rounds, rounds_of
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.files import LoadedDataset, find_dataset, read_dataset
from simmerge_ray.selector.data.rewards import RewardedMerge
from simmerge_ray.selector.data.scoring import Scoring
from simmerge_ray.selector.data.splits import Fold, checkpoint_folds, domain_folds, pairs_of
from simmerge_ray.selector.models.model import FittedModel
from simmerge_ray.selector.models.train import fit_models, usable_folds
from simmerge_ray.service.bandit.policy import Noise
from simmerge_ray.service.bandit.posterior import GaussianPosterior
from simmerge_ray.service.bandit.warm_start import Merges, cold_ridge, merges_of, start_from_labels

NUM_RESAMPLES = 2000
STUDY_FOLDS = 4  # for the level out of fold where there are several bases: hundreds of contexts need no more

Cluster = tuple[str, str]
"""Base and unseen domain."""


@dataclass(frozen=True)
class Knowledge:
    """A selector and its arms' posteriors, from labels; prior knows nothing but how far arms usually differ."""

    model: FittedModel
    warm: Mapping[str, GaussianPosterior]
    prior: GaussianPosterior
    noise: Noise


@dataclass(frozen=True)
class Start:
    """What policies know before the first round of a cluster, and the merges that they are asked about. dataset: its
    contexts may have measured more arms than its own, that come later. fixed: column of the best fixed arm. static:
    (M, K) predictions. gaps: by row of the dataset."""

    dataset: SelectionDataset
    asked: Merges
    known: Knowledge
    fixed: int
    static: np.ndarray
    gaps: Mapping[int, float]

    def rounds(self, first_half: bool, later: Sequence[str] = ()) -> Rounds:
        """Every merge once; arms that come later are the last columns."""
        asked, dataset = self.asked, replace(self.dataset, arms=(*self.dataset.arms, *later))
        return rounds_of(dataset, asked.rows, asked.z, asked.level, self.gaps, first_half)

    def order(self, number: int, num_rounds: int) -> np.ndarray:
        """Merges in random order, and again from the start where there are fewer than the rounds."""
        return repeated(len(self.asked.rows), num_rounds, number)


def repeated(num_merges: int, num_rounds: int, number: int) -> np.ndarray:
    """(num_rounds,) places of merges in random order; none comes again before all have come."""
    generator = np.random.default_rng([number, num_merges])
    times = -(-num_rounds // num_merges)
    return np.concatenate([generator.permutation(num_merges) for _ in range(times)])[:num_rounds]


def learned(training: SelectionDataset, config: TrainConfig, rewards: Sequence[RewardedMerge] = ()) -> Knowledge:
    """Train a selector on labels and rewards; the arms' posteriors come from the labels, as in `service.retraining`."""
    (model,) = fit_models(training, [range(len(training.contexts))], config, None, rewards)
    folds = usable_folds(checkpoint_folds(pairs_of(training.contexts), config.num_folds, config.seed))
    models = fit_models(training, [fold.training for fold in folds], config, None, rewards)
    warm, noise = start_from_labels(training, model, folds, config, models)
    size = next(iter(warm.values())).num_dimensions
    prior = GaussianPosterior.prior(size, cold_ridge(noise))
    return Knowledge(model, warm, prior, noise)


def gaps_of(dataset: SelectionDataset) -> dict[int, float]:
    """By row, where GapClosed is defined."""
    every = Scoring.of(dataset.contexts, dataset.arms)
    return dict(zip(every.rows.tolist(), every.gap.tolist(), strict=True))


def best_fixed_column(training: SelectionDataset) -> int:
    """Column of the arm that is best when taken everywhere."""
    return Scoring.of(training.contexts, training.arms).best_fixed()


def load_with_later_arms(path: Path, arms: Sequence[str] | None = None, later: Sequence[str] = ()) -> LoadedDataset:
    """A data set, errors as `read_dataset`; arms that come later are measured in its contexts, but no arms of it."""
    found = find_dataset(path)
    loaded = read_dataset(found, (*arms, *later) if arms else None)
    kept = {arm: column for column, arm in enumerate(loaded.dataset.arms) if arm not in later}
    utilities = loaded.dataset.utilities[:, list(kept.values())]
    return replace(loaded, dataset=replace(loaded.dataset, arms=tuple(kept), utilities=utilities))


def starts(
    dataset: SelectionDataset, base_of: Mapping[str, str], config: TrainConfig | None = None
) -> dict[Cluster, Start]:
    """By base and unseen domain; the bases of a domain share one selector."""
    folds = (starts_of(fold, dataset, base_of, config) for fold in domain_folds(dataset.contexts))
    return {cluster: start for of_fold in folds for cluster, start in of_fold.items()}


def starts_of(
    fold: Fold, dataset: SelectionDataset, base_of: Mapping[str, str], config: TrainConfig | None = None
) -> dict[Cluster, Start]:
    """By base, of one unseen domain. config: None is the package's own, with fewer folds for several bases."""
    if config is None:
        config = TrainConfig(num_folds=STUDY_FOLDS) if len(set(base_of.values())) > 1 else TrainConfig()
    gaps, found = gaps_of(dataset), {}
    training = dataset.subset(fold.training)
    known = learned(training, config)
    predicted = known.model.predict(dataset.features, [context.task for context in dataset.contexts])[0]
    bases = [base_of[dataset.contexts[row].left] for row in fold.tested]
    for base in sorted(set(bases)):
        rows = [row for row, of in zip(fold.tested, bases, strict=True) if of == base]
        asked = merges_of(dataset, known.model, rows)
        static = np.array([predicted[list(unit)].mean(0) for unit in asked.rows])
        found[base, fold.name] = Start(dataset, asked, known, best_fixed_column(training), static, gaps)
    return found


def drawn_clusters(clusters: Sequence[Cluster], num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> np.ndarray:
    """(num_resamples, C): how often each cluster is in a sample of bases with replacement, then of their domains."""
    generator = np.random.default_rng(seed)
    bases = sorted({base for base, _ in clusters})
    members = [[place for place, one in enumerate(clusters) if one[0] == base] for base in bases]
    weights = np.zeros((num_resamples, len(clusters)))
    drawn = generator.integers(len(bases), size=(num_resamples, len(bases)))
    for sample in range(num_resamples):
        for base in drawn[sample]:
            of = members[base]
            weights[sample, of] += np.bincount(generator.integers(len(of), size=len(of)), minlength=len(of))
    return weights


def interval(weights: np.ndarray, values: np.ndarray, divisor: np.ndarray | None = None) -> np.ndarray:
    """(2, ...) 95 % interval of the mean of (C, ...) values, or of their sum over that of `divisor`; without NaN."""
    of = np.ones(values.shape) if divisor is None else np.broadcast_to(divisor, values.shape)
    known = ~np.isnan(values)
    total = np.tensordot(weights, np.where(known, values, 0.0), 1)
    below = np.tensordot(weights, np.where(known, of, 0.0), 1)
    ratio = np.divide(total, below, out=np.full(total.shape, np.nan), where=below != 0)
    if np.isnan(ratio).all():
        return np.full((2, *values.shape[1:]), np.nan)
    result: np.ndarray = np.nanquantile(ratio, [0.025, 0.975], axis=0)
    return result


def draw_regret(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], label: str, path: Path, marks: Sequence[float] = ()
) -> Place:
    """By policy the cumulative regret (T,) after each round, and its interval (2, T). marks: rounds to point out."""
    figure, axes = new_figure(7, 4.5)
    axis = axes[0][0]
    for name, (mean, (low, high)) in curves.items():
        numbers = range(1, len(mean) + 1)
        (line,) = axis.plot(numbers, mean, label=name)
        axis.fill_between(numbers, low, high, alpha=0.12, color=line.get_color())
    for where in marks:
        axis.axvline(where, color="grey", linestyle=":", linewidth=1)
    axis.set_xlabel(label)
    axis.set_ylabel("cumulative regret (utility)")
    axis.legend()
    return save_figure(figure, path.parent, path.name)
