"""The SIGNALS table and the feature columns of an ordered pair. No torch.

A signal gives one or more columns, named `signal_statistic`. `FEATURE_SCHEMA` changes when a column changes its
meaning; tables and selectors of another schema are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from simmerge_ray.base.errors import ConfigError

FEATURE_SCHEMA = 2

_DISTRIBUTION = ("mean", "median", "q10", "q90")
_LAYERS = ("mean", "sd", "min", "early", "middle", "late")
_WEIGHTS = ("global", "attention", "mlp", "embedding", "norm", *_LAYERS)
_RATIOS = tuple(statistic for statistic in _WEIGHTS if statistic != "min")  # swapped, it would be the maximum
_LOG_FLOOR = 1e-6


def _log(value: float) -> float:
    return math.log(value + _LOG_FLOOR)


def _identity(value: float) -> float:
    return value


@dataclass(frozen=True)
class Signal:
    """One named similarity of an ordered pair.

    family: what it is computed from (probes or weights). needs_base: absent from a table made without a base.
    swapped: the signal that takes its place when left and right change places (itself when symmetric).
    negated: whether the value changes its sign then (a spread does not). scale: applied before a selector standardises.
    """

    name: str
    family: str
    statistics: tuple[str, ...]
    meaning: str
    needs_base: bool = False
    swapped: str | None = None
    negated: bool = False
    scale: Callable[[float], float] = _identity

    @property
    def of_weights(self) -> bool:
        """Whether it is the same for every task."""
        return self.family in ("weights", "task vectors") or self.name == "task_vector_norm"

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(f"{self.name}_{statistic}" for statistic in self.statistics)


_ROWS = (
    Signal("kl_lr", "divergence", _DISTRIBUTION, "KL(left || right) of next tokens, nats", False, "kl_rl", scale=_log),
    Signal("kl_rl", "divergence", _DISTRIBUTION, "KL(right || left) of next tokens, nats", False, "kl_lr", scale=_log),
    Signal(
        "kl_greedy_lr", "divergence", _DISTRIBUTION, "KL(left || right) on 8 greedy tokens of the base, nats", True,
        "kl_greedy_rl", scale=_log,
    ),
    Signal(
        "kl_greedy_rl", "divergence", _DISTRIBUTION, "KL(right || left) on 8 greedy tokens of the base, nats", True,
        "kl_greedy_lr", scale=_log,
    ),
    Signal("activation_cosine", "activations", _LAYERS, "cosine of hidden states, per layer and token"),
    Signal("attention_cosine", "attention", _LAYERS, "cosine of attention rows, per layer, head and query"),
    Signal("weight_cosine", "weights", _WEIGHTS, "cosine of the weights"),
    Signal("weight_l2", "weights", _WEIGHTS, "l2 distance of the weights over the norm of the base", scale=_log),
    Signal("task_vector_cosine", "task vectors", _WEIGHTS, "cosine of the task vectors", True),
    Signal("task_vector_norm_ratio", "task vectors", _RATIOS, "log of |left| over |right|", True, negated=True),
    Signal("sign_conflict", "task vectors", _WEIGHTS, "share of coordinates moved in opposite directions", True),
    Signal("trimmed_overlap", "task vectors", _WEIGHTS, "coordinates among the largest 20 % of both", True),
    Signal(
        "task_vector_norm", "single", ("left", "right"), "|task vector| over the norm of the base", True, scale=_log
    ),
    Signal("entropy", "single", ("left", "right"), "entropy of next tokens on the probes, nats"),
    Signal("loss", "single", ("left", "right"), "next-token loss on the probes, nats"),
)  # fmt: skip
SIGNALS: Mapping[str, Signal] = {signal.name: signal for signal in _ROWS}


def feature_columns(with_base: bool, base_pair: bool = False) -> tuple[str, ...]:
    """Ordered feature columns of a table made with or without a base.

    base_pair: of a pair of the base itself and a checkpoint, which has no task vectors to compare.
    """
    return tuple(
        column
        for signal in SIGNALS.values()
        if (with_base or not signal.needs_base) and not (base_pair and signal.family == "task vectors")
        for column in signal.columns
    )


def layer_thirds(num_layers: int) -> dict[str, list[int]]:
    """Layer indices of the early, middle and late third; none is empty (a shallow stack shares layers)."""
    bounds = [round(num_layers * part / 3) for part in range(4)]
    return {
        third: list(range(first, last)) or [min(first, num_layers - 1)]
        for third, (first, last) in zip(("early", "middle", "late"), pairwise(bounds), strict=True)
    }


@lru_cache(1024)
def column_signal(column: str) -> Signal:
    """The signal that a column belongs to."""
    return next(signal for signal in SIGNALS.values() if column in signal.columns)


def swapped_features(features: Mapping[str, float]) -> dict[str, float]:
    """Features of (right, left) from those of (left, right). Raises ConfigError: one has no value of the other side."""
    swapped = {}
    for column in features:
        signal = column_signal(column)
        statistic = column.removeprefix(f"{signal.name}_")
        source = {"left": "right", "right": "left"}.get(statistic, statistic)
        partner = f"{signal.swapped or signal.name}_{source}"
        if partner not in features:
            raise ConfigError(f"signals of a pair have {column!r} and not {partner!r}; compute the table again")
        value = features[partner]
        swapped[column] = -value if signal.negated and statistic != "sd" else value
    return swapped


def scaled_features(features: Mapping[str, float], columns: Sequence[str]) -> list[float]:
    """Values of the columns in order, each on the scale its signal declares (KL and distances as logarithms).

    Raises ConfigError: a value that is not there, or has no logarithm.
    """
    try:
        return [column_signal(column).scale(features[column]) for column in columns]
    except (KeyError, ValueError) as error:
        raise ConfigError(f"signals of a pair cannot be scaled ({error}); compute the table again") from None


def both_orders(values: np.ndarray, columns: Sequence[str]) -> np.ndarray:
    """Scaled features of (left, right) and of (right, left): `scaled_features` of many pairs at once.

    Args:
        values: (F, N), unscaled, a row for each column.

    Returns:
        (N, 2, F), as a selector takes them.
    """
    both = np.empty((2, *values.shape))
    for index, column in enumerate(columns):
        logarithmic = column_signal(column).scale is _log
        both[0, index] = np.log(values[index] + _LOG_FLOOR) if logarithmic else values[index]
    for index, (source, sign) in enumerate(_swaps(tuple(columns))):
        np.multiply(both[0, source], sign, out=both[1, index])
    return np.ascontiguousarray(both.transpose(2, 0, 1))


@lru_cache(16)
def _swaps(columns: tuple[str, ...]) -> list[tuple[int, float]]:
    """For each column, the place of the one that takes its place when left and right are swapped, and its sign."""
    signs = swapped_features(dict.fromkeys(columns, 1.0))
    places = swapped_features({column: float(place) for place, column in enumerate(columns)})
    return [(int(abs(places[column])), signs[column]) for column in columns]
