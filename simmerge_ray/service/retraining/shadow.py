"""Is a new selector worse than the present one? On held-out rewards from the log, and on the labels.

On the log: what each selector's own choices would have earned, doubly robust, and their difference decision by decision
(`bandit.off_policy`). The rewards are later than all that either selector was trained on. On the labels: the same
training with and without the new rewards, on checkpoints that are left out of both. The first sees merges of the kind
that is asked for now, but few; the second sees many, but old ones: it shows what was forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from simmerge_ray.plans.keeping import named_arms
from simmerge_ray.selector.assessment.crossval import bench_of
from simmerge_ray.selector.assessment.folds import CrossValidation
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.scoring import UTILITY, Scoring, option_scores, shares_of
from simmerge_ray.selector.data.splits import Fold, fold_mean
from simmerge_ray.selector.models.model import Selector
from simmerge_ray.selector.models.policy import SafeOverride
from simmerge_ray.selector.models.train import predict_folds
from simmerge_ray.service.bandit.off_policy import ValueEstimate, doubly_robust, doubly_robust_gain
from simmerge_ray.service.retraining.material import Material
from simmerge_ray.service.retraining.reward_labels import Rewarded

MARGIN = 0.03  # utility on the log, GapClosed on the labels: what counts as not worse
MIN_DRAWN = 20
_ONE_SIDED_95 = 1.645


@dataclass(frozen=True)
class OnLog:
    """Mean rewards (utility) of the choices of both selectors on `num` drawn decisions; in `num_differ` they differ."""

    num: int
    num_differ: int
    observed: float
    present: ValueEstimate
    candidate: ValueEstimate
    gain: ValueEstimate

    @property
    def low(self) -> float:
        """The gain is above this with 95 %."""
        return self.gain.value - _ONE_SIDED_95 * self.gain.standard_error

    @property
    def high(self) -> float:
        """The gain is below this with 95 %."""
        return self.gain.value + _ONE_SIDED_95 * self.gain.standard_error


@dataclass(frozen=True)
class OnLabels:
    """Headline, in `unit`, of the best predicted arm on checkpoints that were left out, with and without new rewards.

    interval: of the gain, 95 %, over checkpoints; None where there are too few.
    """

    num_contexts: int
    unit: str
    present: float
    candidate: float
    gain: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class ShadowVerdict:
    """Whether to promote, and why."""

    promote: bool
    reason: str


def compare_on_log(present: Selector, candidate: Selector, held_out: Sequence[Rewarded]) -> OnLog | None:
    """None where fewer than two of the decisions were drawn.

    Each selector plays what it would choose (its safe policy) among the arms that the decision had. The rewards' model
    is the mean of both selectors' predictions, so that it favours neither; what it gets wrong is corrected with the
    logged propensities.
    """
    drawn = [one for one in held_out if one.drawn]
    if len(drawn) < 2:
        return None
    rows = [_row(present, candidate, one) for one in drawn]
    utilities = np.array([one.utility for one in drawn])
    old, new, logged, predicted, expected_old, expected_new = (np.array(column) for column in zip(*rows, strict=True))
    return OnLog(
        len(drawn),
        int((expected_old != expected_new).sum()),
        float(utilities.mean()),
        doubly_robust(utilities, old, logged, predicted, expected_old),
        doubly_robust(utilities, new, logged, predicted, expected_new),
        doubly_robust_gain(utilities, new, old, logged, predicted, expected_new - expected_old),
    )


def _row(present: Selector, candidate: Selector, one: Rewarded) -> tuple[float, float, float, float, float, float]:
    """For the logged arm: probability under both selectors, propensity, model; and the model at both choices."""
    arms, played = one.decision.arms, one.decision.arms.index(one.decision.arm)
    choices, predictions = zip(*(_choice(selector, one) for selector in (present, candidate)), strict=True)
    known = ~np.isnan(predictions)
    total = np.where(known, predictions, 0.0).sum(0)
    model = np.divide(total, known.sum(0), out=np.full(len(arms), one.decision.level), where=known.any(0))
    old, new = choices
    propensity = one.decision.propensities[played]
    return float(old == played), float(new == played), propensity, model[played], model[old], model[new]


def _choice(selector: Selector, one: Rewarded) -> tuple[int, np.ndarray]:
    """Place of the arm that a selector takes among those of the decision, and (K,) what it predicts of them."""
    arms, features = one.decision.arms, one.decision.features
    utility = selector.predict(features, one.tasks)[0].mean(0)
    known = dict(zip(named_arms(selector.arms, *one.pair), utility.tolist(), strict=True))
    predicted = np.array([known.get(arm, np.nan) for arm in arms])
    chosen = selector.choose(features, one.tasks, pair=one.pair).arm
    if chosen in arms:
        return arms.index(chosen), predicted
    # The same merge by another arm's name, or an arm that came later: the best of those that it could have taken.
    return int(np.nan_to_num(predicted, nan=-np.inf).argmax()), predicted


def override_on_log(selector: Selector, material: Material) -> SafeOverride:
    """The override fitted on drawn decisions of the training part, where these support leaving the best fixed arm and
    the labels did not.

    Labels on which leaving it has not paid forbid it for good, whatever rewards say; so the threshold is chosen on the
    rewards as well, in the way of `selector.policy.fit_override`: that with the largest gain (doubly robust), if the
    gain is above 0 with 95 %; otherwise the override is unchanged. Merges of checkpoints that no fold leaves out do not
    count: their predictions would be those of a model that knew them.
    """
    override, arms = selector.override, selector.arms
    left_out = [_left_out(material.dataset, fold) for fold in material.folds]
    rows = []
    for one in material.training:
        if not one.drawn:
            continue
        pairs, names = zip(left_out, material.fold_models, strict=True), one.decision.arms
        models = [model for unseen, model in pairs if unseen.intersection(one.pair)]
        known = named_arms(arms, *one.pair)
        if not (models and override.best_fixed in names and set(names) <= set(known)):
            continue
        columns = [known.index(name) for name in names]
        every = [model.predict(one.decision.features, one.tasks)[0].mean(0) for model in models]
        predicted = np.mean(every, axis=0)[columns]
        pick, fixed, played = int(predicted.argmax()), names.index(override.best_fixed), names.index(one.decision.arm)
        weight = (float(played == pick) - float(played == fixed)) / one.decision.propensities[played]
        advantage = predicted[pick] - predicted[fixed]
        rows.append((advantage, advantage + weight * (one.utility - predicted[played])))
    if len(rows) < MIN_DRAWN:
        return override
    advantages, gained = np.array(rows).T
    candidates = np.array([0.0, *np.unique(advantages[advantages > 0])])
    applied = (advantages > candidates[:, None]) * gained
    gains = applied.mean(1)
    chosen = int(np.flatnonzero(gains >= gains.max() - 1e-12)[-1])
    error = float(applied[chosen].std(ddof=1) / np.sqrt(len(rows)))
    if gains[chosen] <= _ONE_SIDED_95 * error:
        return override
    threshold, share = float(candidates[chosen]), float((advantages > candidates[chosen]).mean())
    return SafeOverride(override.best_fixed, threshold, float(gains[chosen]), error, share, UTILITY)


def _left_out(dataset: SelectionDataset, fold: Fold) -> frozenset[str]:
    """Checkpoints of the data set that a fold's training part does not have."""
    trained = {name for row in fold.training for name in (dataset.contexts[row].left, dataset.contexts[row].right)}
    return frozenset(name for one in dataset.contexts for name in (one.left, one.right) if name not in trained)


def compare_on_labels(material: Material) -> OnLabels | None:
    """The fold models of both on what their folds left out, one arm per merge; None without folds."""
    dataset, folds, measured = material.dataset, material.folds, list(material.measured)
    if not folds:
        return None
    arms = tuple(dataset.arms[k] for k in measured)
    known = replace(dataset, arms=arms, utilities=dataset.utilities[:, measured])
    crossval = CrossValidation(known, material.config, folds, Scoring.of(known.contexts, arms))
    bench = bench_of(crossval, True, material.loaded.base_of)
    shares = []
    for models in (material.models_without_groups(material.known), material.fold_models):
        predicted = [values[:, measured] for values in predict_folds(dataset, folds, models)]
        scores = option_scores(fold_mean(folds, predicted, len(dataset.contexts)), arms)
        shares.append(shares_of(scores, bench.units))
    old, new = shares
    figures = bench.measure(new, old)
    if figures["gain"] is None:
        return None
    interval = figures["gain_interval"]
    num = int((~np.isnan(new).any(1)).sum())
    return OnLabels(
        num,
        crossval.scoring.unit,
        figures["gap_closed"] - figures["gain"],
        figures["gap_closed"],
        figures["gain"],
        (interval[0], interval[1]) if interval else None,
    )


def verdict(log: OnLog | None, labels: OnLabels | None, margin: float) -> ShadowVerdict:
    """Promote what is not worse than the present selector by more than the margin, on the log and on the labels.

    On the log that has to be shown: the 95 % bound of the difference is above the margin. On the labels the difference
    itself is: both were measured on the very same merges, and their interval, over checkpoints, is of what other
    catalogues would show.
    """
    if log is None or log.num < MIN_DRAWN:
        found = log.num if log else 0
        reason = f"{found} of the held-out rewards are of drawn decisions; {MIN_DRAWN} are needed to compare"
        return ShadowVerdict(False, reason)
    gain = f"{log.gain.value:+.3f} utility"
    if log.high < 0:
        return ShadowVerdict(False, f"on the log it is worse: {gain}, below {log.high:+.3f} with 95 %")
    if log.low < -margin:
        reason = f"the log cannot rule out that it is worse by more than {margin:g}: {gain}, above {log.low:+.3f}"
        return ShadowVerdict(False, f"{reason} with 95 %; more rewards of drawn decisions narrow that")
    if labels is not None and labels.gain < -margin:
        return ShadowVerdict(False, f"on the labels it is worse: {labels.gain:+.3f} {labels.unit}, at most {-margin:g}")
    also = "too few checkpoints to compare on the labels"
    if labels is not None:
        also = f"on the labels {labels.gain:+.3f} {labels.unit}"
    return ShadowVerdict(True, f"on the log {gain}, above {log.low:+.3f} with 95 %; {also}")
