"""What another policy would have reached, from the log alone: doubly robust estimates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.errors import BanditError


@dataclass(frozen=True)
class ValueEstimate:
    """Mean reward under the other policy, its standard error, and how many decisions it really rests on.

    effective: `(sum w)^2 / sum w^2` (Kish), out of the decisions that were given.
    """

    value: float
    standard_error: float
    effective: float


def importance_weights(target: np.ndarray, logged: np.ndarray) -> np.ndarray:
    """(N,) probability under the target policy over that under which the logged arm was played.
    Raises BanditError: a logged propensity that is not above 0 (such a decision was never drawn), or a target outside
    [0, 1].
    """
    if not (logged > 0).all():
        raise BanditError("a logged propensity is 0; decisions without exploration are left out of such estimates")
    if ((target < 0) | (target > 1)).any():
        raise BanditError("a probability of the target policy is outside [0, 1]")
    return target / logged


def doubly_robust(
    rewards: np.ndarray, target: np.ndarray, logged: np.ndarray, predicted: np.ndarray, expected: np.ndarray
) -> ValueEstimate:
    """`mean(expected + w (r - predicted))` (Dudik et al. 2011, arXiv:1103.4601).

    Args:
        predicted: (N,) by a model of the logged arm's reward. expected: (N,) of the model's rewards under the target
            policy. Unbiased where either the propensities or the model are right.
    """
    weights = importance_weights(target, logged)
    return _estimate(expected + weights * (rewards - predicted), weights)


def doubly_robust_gain(
    rewards: np.ndarray,
    target: np.ndarray,
    reference: np.ndarray,
    logged: np.ndarray,
    predicted: np.ndarray,
    expected_gain: np.ndarray,
) -> ValueEstimate:
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
    return ValueEstimate(estimate.value, estimate.standard_error, _effective(np.abs(weights)))


def _estimate(values: np.ndarray, weights: np.ndarray) -> ValueEstimate:
    if len(values) < 2:
        raise BanditError("an estimate needs two decisions at least")
    return ValueEstimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))), _effective(weights))


def _effective(weights: np.ndarray) -> float:
    squares = float(np.square(weights).sum())
    return float(weights.sum()) ** 2 / squares if squares > 0 else 0.0
