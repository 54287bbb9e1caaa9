"""Level and contrasts of measured utilities, and the rows that a model is fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.selector.data.rewards import SingleArms


@dataclass(frozen=True)
class TrainingSet:
    """N contexts as a model sees them.

    inputs: (N, O, D), standardised, in O orders: both of the pair, or one where there is none.
    level: (N,), mean utility of the reference arms.
    contrasts: (N, K), utility minus level; NaN where a later arm was not measured. reference: columns whose contrasts
    sum to zero. pairs: of the contexts. rewards: merges of which one arm was observed, beside the contexts.
    """

    inputs: np.ndarray
    level: np.ndarray
    contrasts: np.ndarray
    reference: tuple[int, ...]
    pairs: tuple[tuple[str, ...], ...]
    rewards: SingleArms | None = None

    @property
    def later(self) -> tuple[int, ...]:
        """Columns of the arms that are not in the reference."""
        return tuple(k for k in range(self.contrasts.shape[1]) if k not in self.reference)


def level_and_contrasts(utilities: np.ndarray, reference: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(N, K) -> (N,), (N, K): `U_o = level + contrast_o`, contrasts sum to zero over the reference arms.

    A later arm is a contrast to the same mean, so adding one changes nothing for the others.
    """
    level = utilities[:, list(reference)].mean(1)
    return level, utilities - level[:, None]
