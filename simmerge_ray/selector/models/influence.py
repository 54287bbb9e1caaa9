"""Why a prediction is what it is: the groups of signals that move it most from the average prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from simmerge_ray.signals.features import column_signal

GROUPS = {
    "divergence": "KL",
    "activations": "activations",
    "attention": "attention",
    "weights": "weights",
    "task vectors": "task vectors",
    "single": "entropy, loss and norms",
}
_NUM_SHOWN = 3
_SMALLEST = 0.0005  # anything below is shown as 0.000


def influences(
    predict: Callable[[np.ndarray], np.ndarray], features: np.ndarray, average: np.ndarray, columns: Sequence[str]
) -> tuple[tuple[str, float], ...]:
    """The three groups of signals with the largest influence on a prediction, and their signed effects.

    The features of one group (KL; activations; attention; weights; task vectors; entropy, loss and norms) are set to
    their averages and the others left as they are; the group's effect is how much the prediction is above that one. The
    model is nonlinear and one group changes at a time: effects need not add up, and where two groups carry the same
    information, as KL and weights often do, each hides the other.

    Args:
        predict: (V * T, 2, F) features of V variants on T tasks -> (V,), pooled over the tasks. features, average:
            (T, 2, F). columns: names of the F features.
    """
    families = np.array([column_signal(column).family for column in columns])
    variants = [features, *(np.where(families == family, average, features) for family in GROUPS)]
    pooled = predict(np.concatenate(variants))
    effects = zip(GROUPS.values(), (pooled[0] - pooled[1:]).tolist(), strict=True)
    largest = sorted(effects, key=lambda effect: -abs(effect[1]))[:_NUM_SHOWN]
    return tuple((name, effect) for name, effect in largest if abs(effect) >= _SMALLEST)
