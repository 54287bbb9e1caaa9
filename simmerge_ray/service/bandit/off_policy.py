"""What another policy would have reached, from the log alone: IPS, SNIPS and doubly robust estimates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.errors import BanditError

Array = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """Mean reward under the other policy, its standard error, and how many decisions it really rests on.

    effective: `(sum w)^2 / sum w^2` (Kish), out of the decisions that were given.
    """

    value: float
    standard_error: float
    effective: float


def importance_weights(target: Array, logged: Array) -> Array:
    """(N,) probability under the target policy over that under which the logged arm was played.

    Raises:
        BanditError: a logged propensity that is not above 0 (such a decision was never drawn), or a target outside
            [0, 1].
    """
    if not (logged > 0).all():
        raise BanditError("a logged propensity is 0; decisions without exploration are left out of such estimates")
    if ((target < 0) | (target > 1)).any():
        raise BanditError("a probability of the target policy is outside [0, 1]")
    result: Array = target / logged
    return result


def inverse_propensity(rewards: Array, target: Array, logged: Array) -> Estimate:
    """IPS: `mean(w r)`. Unbiased where the logged policy plays whatever the target does (Horvitz and Thompson 1952)."""
    weights = importance_weights(target, logged)
    return _estimate(weights * rewards, weights)


def self_normalised(rewards: Array, target: Array, logged: Array) -> Estimate:
    """SNIPS: `sum(w r) / sum(w)`. Biased by O(1/n), far less noisy (Swaminathan and Joachims 2015)."""
    weights = importance_weights(target, logged)
    total = float(weights.sum())
    if total <= 0:
        raise BanditError("the target policy plays nothing that was logged")
    value = float(weights @ rewards / total)
    error = float(np.sqrt(np.square(weights * (rewards - value)).sum()) / total)
    return Estimate(value, error, _effective(weights))


def doubly_robust(rewards: Array, target: Array, logged: Array, predicted: Array, expected: Array) -> Estimate:
    """`mean(expected + w (r - predicted))` (Dudik et al. 2011, arXiv:1103.4601).

    Args:
        predicted: (N,) by a model of the logged arm's reward. expected: (N,) of the model's rewards under the target
            policy. Unbiased where either the propensities or the model are right.
    """
    weights = importance_weights(target, logged)
    return _estimate(expected + weights * (rewards - predicted), weights)


def doubly_robust_gain(
    rewards: Array, target: Array, reference: Array, logged: Array, predicted: Array, expected_gain: Array
) -> Estimate:
    """Of the target policy over a reference policy, doubly robust, decision by decision: where both play the same the
    difference is 0 exactly, so its error is far below that of two separate estimates.

    Args:
        target, reference: probabilities of the logged arm. predicted: as in `doubly_robust`. expected_gain: (N,) of the
            model's rewards under the target less under the reference.

    Returns:
        effective: of the decisions in which the two differ at all.
    """
    weights = importance_weights(target, logged) - importance_weights(reference, logged)
    estimate = _estimate(expected_gain + weights * (rewards - predicted), weights)
    return Estimate(estimate.value, estimate.standard_error, _effective(np.abs(weights)))


def _estimate(values: Array, weights: Array) -> Estimate:
    if len(values) < 2:
        raise BanditError("an estimate needs two decisions at least")
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))), _effective(weights))


def _effective(weights: Array) -> float:
    squares = float(np.square(weights).sum())
    return float(weights.sum()) ** 2 / squares if squares > 0 else 0.0
