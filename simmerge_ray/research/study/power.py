"""How large a study must be: the gain over the best fixed arm, simulated from labels that exist already.

The gain of a merge is taken to be `mean + base + left + right + rest`, independent effects of the base, of the two
checkpoints and of the pair with its items. The last two are estimated from a pilot; one base says nothing of the
spread between bases, which is therefore assumed, and varied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import LabelError
from simmerge_ray.research.study.gains import MergeScoring, gain_over_best_fixed
from simmerge_ray.selector.assessment.folds import CrossValidation
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.splits import Pair, pairs_of, resampled_weights

NUM_DOMAINS = 4
_MIN_MERGES = 10


@dataclass(frozen=True)
class Spread:
    """Standard deviations of a merge's gain, in GapClosed points: of a checkpoint's effect and of the rest."""

    mean: float
    checkpoint: float
    rest: float
    num_merges: int


@dataclass(frozen=True)
class Power:
    """What a study of a size finds: how often the lower end of the 95 % interval is above 0, its mean half-width, and
    the standard deviation of the estimate over simulated studies (an honest half-width is 1.96 x this error)."""

    num_bases: int
    num_experts: int
    base_sd: float
    power: float
    half_width: float
    error: float


def pilot_gains(dataset: SelectionDataset, config: TrainConfig) -> tuple[list[float], list[Pair]]:
    """Gain of each merge over the best fixed arm, in GapClosed points, with its checkpoints left out of the training.

    The headline is a ratio of sums for each task; a merge's gain on a task is divided by the task's mean gap, so that
    the mean over the merges of a task is the headline's ratio.
    """
    crossval = CrossValidation.of(dataset, config, None)
    scoring = crossval.scoring
    gained = gain_over_best_fixed(crossval, MergeScoring.of(dataset, None, config.seed))
    mean_gap = {task: scoring.gap[scoring.tasks == task].mean() for task in np.unique(scoring.tasks)}
    by_pair: dict[Pair, list[float]] = {}
    pairs = pairs_of(dataset.contexts)
    for row, task, value in zip(scoring.rows, scoring.tasks, gained, strict=True):
        by_pair.setdefault(pairs[row], []).append(100 * float(value / mean_gap[task]))
    return [float(np.mean(values)) for values in by_pair.values()], list(by_pair)


def estimate_spread(gains: Sequence[float], pairs: Sequence[Pair]) -> Spread:
    """Moments of the gains (num_merges,) of a pilot: two merges that share a checkpoint covary by the variance of its
    effect. LabelError if they are too few."""
    if len(gains) < _MIN_MERGES:
        raise LabelError(f"{len(gains)} merges are too few for a power simulation; at least {_MIN_MERGES} are needed")
    values = np.asarray(gains, dtype=np.float64)
    centred = values - values.mean()
    shared = [centred[i] * centred[j] for i, j in combinations(range(len(pairs)), 2) if set(pairs[i]) & set(pairs[j])]
    checkpoint = max(0.0, float(np.mean(shared))) if shared else 0.0
    rest = max(0.0, float(centred.var(ddof=1)) - 2 * checkpoint)
    return Spread(float(values.mean()), checkpoint**0.5, rest**0.5, len(gains))


def simulate_power(
    spread: Spread,
    num_bases: int,
    num_experts: int,
    mean: float,
    base_sd: float,
    num_studies: int = 200,
    num_resamples: int = 400,
    seed: int = 0,
) -> Power:
    """Draw studies and analyse each as the real one: intervals by resampling bases, then checkpoints. num_experts: of
    each base, spread evenly over the domains; cross-domain pairs are merged. mean: the true gain."""
    generator = np.random.default_rng(seed)
    experts = [(base, number) for base in range(num_bases) for number in range(num_experts)]
    pairs = [(a, b) for a, b in combinations(experts, 2) if a[0] == b[0] and a[1] % NUM_DOMAINS != b[1] % NUM_DOMAINS]
    place = {expert: index for index, expert in enumerate(experts)}
    left, right = np.array([(place[a], place[b]) for a, b in pairs]).T
    bases = np.array([base for (base, _), _ in pairs])
    effects = generator.standard_normal((num_studies, len(experts))) * spread.checkpoint
    gains = mean + (generator.standard_normal((num_studies, num_bases)) * base_sd)[:, bases]
    gains += effects[:, left] + effects[:, right] + generator.standard_normal((num_studies, len(pairs))) * spread.rest
    names = {expert: f"{expert[0]}-{expert[1]}" for expert in experts}
    base_of = {name: str(base) for (base, _), name in names.items()}
    weights = resampled_weights([(names[a], names[b]) for a, b in pairs], base_of, num_resamples, seed)
    weights = weights[weights.sum(1) > 0]
    low, high = np.quantile(gains @ weights.T / weights.sum(1), [0.025, 0.975], axis=1)
    power, half_width, error = (low > 0).mean(), (high - low).mean() / 2, gains.mean(1).std(ddof=1)
    return Power(num_bases, num_experts, base_sd, float(power), float(half_width), float(error))
