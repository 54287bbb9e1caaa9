"""From predictions to a choice: leave the best fixed arm only where that has paid, and only for known checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.selector.data.scoring import Scoring
from simmerge_ray.selector.data.splits import Pair

INTERVAL_LEVELS = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class SafeOverride:
    """When to leave the best fixed arm: where the predicted advantage over it is above the threshold.

    threshold: in utility, infinite where leaving it has not paid. gain, gain_se: what the rule gained over the best
    fixed arm on checkpoints left out, and its jackknife standard error over checkpoints, in `unit`; None where it could
    not be measured. share: part of the merges in which it left the best fixed arm.
    """

    best_fixed: str
    threshold: float
    gain: float | None
    gain_se: float | None
    share: float
    unit: str

    @property
    def never(self) -> bool:
        """Whether the best fixed arm is never left."""
        return math.isinf(self.threshold)

    @property
    def why_never(self) -> str:
        """Why it is never left: measured on checkpoints that were left out, or nothing could be left out."""
        if self.gain is None:
            return "there were too few checkpoints to leave some out, so whether leaving it pays is not known"
        return "leaving it has not paid on checkpoints that were left out"


@dataclass(frozen=True)
class Choice:
    """An arm for a pair.

    overrode: whether it is another than the best fixed one. reason: why, in words. advantage: predicted utility of the
    arm that looks best over the best fixed one. distance: to the training data; the selector has its limit.
    """

    arm: str
    overrode: bool
    reason: str
    advantage: float
    distance: float


@dataclass(frozen=True)
class Intervals:
    """Half-widths of prediction intervals, from errors on checkpoints that were left out.

    half_widths: (L, K), in utility, for each of `levels` and each arm.
    """

    levels: tuple[float, ...]
    half_widths: np.ndarray


def fit_override(
    scoring: Scoring, arms: Sequence[str], units: Sequence[Sequence[int]], pairs: Sequence[Pair], predicted: np.ndarray
) -> SafeOverride:
    """Choose the threshold on out-of-fold predictions.

    The threshold with the largest gain over the best fixed arm; infinity unless that gain exceeds its own standard
    error, since the best of many thresholds gains something on noise as well.

    Args:
        arms: as predicted; one that keeps a parent is never the fixed one. units: rows that share one choice.
        predicted: (N, K) by models that were not trained on one of the row's
            checkpoints; rows that no fold tested are NaN.
    """
    fixed = scoring.best_fixed()
    never = SafeOverride(arms[fixed], math.inf, None, None, 0.0, scoring.unit)
    known = [[row for row in unit if not np.isnan(predicted[row]).any()] for unit in units]
    known = [unit for unit in known if unit]
    if not known:
        return never
    pooled = np.array([predicted[unit].mean(0) for unit in known])
    picks, advantages = pooled.argmax(1), pooled.max(1) - pooled[:, fixed]
    advantage, pick = np.zeros(len(predicted)), np.full(len(predicted), fixed)
    for unit, chosen, value in zip(known, picks, advantages, strict=True):
        advantage[unit], pick[unit] = value, chosen
    at = scoring.rows
    gained = scoring.closed[np.arange(len(at)), pick[at]] - scoring.closed[:, fixed]
    candidates = np.array([0.0, *np.unique(advantages[advantages > 0])])
    applied = (advantage[at][None] > candidates[:, None]) * gained[None]
    gains = np.nan_to_num(scoring.headline(applied))
    # Of equally good ones the largest: it leaves the best fixed arm least often.
    chosen = int(np.flatnonzero(gains >= gains.max() - 1e-12)[-1])
    error = _jackknife(scoring, applied[chosen], [pairs[row] for row in at])
    gain, threshold = float(gains[chosen]), float(candidates[chosen])
    if gain <= 0 or gain <= error:
        return SafeOverride(arms[fixed], math.inf, 0.0, 0.0, 0.0, scoring.unit)
    return SafeOverride(arms[fixed], threshold, gain, error, float((advantages > threshold).mean()), scoring.unit)


def _jackknife(scoring: Scoring, numerators: np.ndarray, pairs: Sequence[Pair]) -> float:
    """Standard error of the headline when each checkpoint is left out in turn; infinite with fewer than three."""
    names = sorted({name for pair in pairs for name in pair})
    if len(names) < 3:
        return math.inf
    weights = np.array([[float(name not in pair) for pair in pairs] for name in names])
    values = scoring.headline(numerators, weights)
    values = values[~np.isnan(values)]
    return float(np.sqrt((len(values) - 1) * values.var())) if len(values) >= 3 else math.inf


def fit_intervals(errors: Sequence[np.ndarray], num_contexts: int) -> Intervals | None:
    """Quantiles of the absolute errors of all folds, with the finite-sample correction of split conformal prediction.

    A context counts in every fold that tested it, and these errors are not independent; `num_contexts` is what the
    correction is taken for. The intervals hold for checkpoints of the kind that was left out, not for any.

    Args:
        errors: per fold (num tested, K), predicted minus measured; NaN where a later arm was not measured.
    """
    if not errors or not num_contexts:
        return None
    corrected = [min(1.0, level * (num_contexts + 1) / num_contexts) for level in INTERVAL_LEVELS]
    of_arms = [column[~np.isnan(column)] for column in np.abs(np.concatenate(errors)).T]
    widths = [np.quantile(known if len(known) else [1.0], corrected, method="higher") for known in of_arms]
    return Intervals(INTERVAL_LEVELS, np.array(widths).T.copy())


def widest(found: Sequence[Intervals | None]) -> Intervals | None:
    """At each level and arm the widest of several; None of none."""
    there = [one for one in found if one is not None]
    if not there:
        return None
    return Intervals(there[0].levels, np.max([one.half_widths for one in there], axis=0))


def safe_scores(override: SafeOverride, arms: Sequence[str], pooled: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(U, K) pooled predictions and (U,) whether the pair is like the training data -> (U, K) one-hot choices."""
    fixed = arms.index(override.best_fixed)
    leaves = known & (pooled.max(1) - pooled[:, fixed] > override.threshold)
    return np.eye(len(arms))[np.where(leaves, pooled.argmax(1), fixed)]


def safe_choice(
    override: SafeOverride, arms: Sequence[str], pooled: np.ndarray, distance: float, limit: float
) -> Choice:
    """The choice for one pair from its (K,) predictions, pooled over the tasks."""
    fixed = override.best_fixed
    advantage = float(pooled.max() - pooled[arms.index(fixed)])
    scores = safe_scores(override, arms, pooled[None], np.array([distance <= limit]))
    arm, looks_best = arms[int(scores[0].argmax())], arms[int(pooled.argmax())]
    if distance > limit:
        reason = (
            f"not trained for such checkpoints: distance {distance:.2f} to the training data, at most {limit:.2f} is "
            f"known; best fixed arm {fixed}"
        )
    elif arm != fixed:
        reason = f"predicted {advantage:+.3f} over the best fixed arm {fixed}, more than {override.threshold:.3f}"
    elif looks_best == fixed:
        reason = f"the best fixed arm {fixed} is predicted to be the best here too"
    elif override.never:
        reason = f"best fixed arm {fixed}: {override.why_never}"
    else:
        reason = (
            f"best fixed arm {fixed}: {looks_best} is predicted {advantage:+.3f} over it, not more than "
            f"{override.threshold:.3f}"
        )
    return Choice(arm, arm != fixed, reason, advantage, distance)
