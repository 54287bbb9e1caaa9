"""Level and contrasts of measured utilities, and the rows that a model is fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.selector.data.rewards import SingleArms


@dataclass(frozen=True)
class TrainingSet:
    """N contexts as a model sees them.

    inputs: (N, 2, D), standardised, both orders of the pair; (N, 1, D) where there is no order, and then 1 stands for
    2 in all shapes. level: (N,), mean utility of the reference arms.
    contrasts: (N, 2, H), utility minus level for both orders and each head (`orders`); NaN where a later arm was not
    measured. reference: heads whose contrasts sum to zero. pairs: of the contexts. rewards: merges of which one arm was
    observed, beside the contexts. keep: whether the last head is that of keep.
    """

    inputs: np.ndarray
    level: np.ndarray
    contrasts: np.ndarray
    reference: tuple[int, ...]
    pairs: tuple[tuple[str, ...], ...]
    rewards: SingleArms | None = None
    keep: bool = False

    @property
    def num_heads(self) -> int:
        return self.contrasts.shape[2]

    @property
    def later(self) -> tuple[int, ...]:
        """Heads that are not in the reference, that of keep among them."""
        return tuple(k for k in range(self.num_heads) if k not in self.reference)

    @property
    def levels(self) -> np.ndarray:
        """(N, 2, 1): the same for both orders."""
        return np.repeat(self.level[:, None], self.inputs.shape[1], axis=1)[..., None]


def level_and_contrasts(utilities: np.ndarray, reference: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(N, K) -> (N,), (N, K): `U_o = level + contrast_o`, contrasts sum to zero over the reference arms.

    A later arm is a contrast to the same mean, so adding one changes nothing for the others.
    """
    level = utilities[:, list(reference)].mean(1)
    return level, utilities - level[:, None]
