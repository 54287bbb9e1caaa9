"""Thresholds of TIES: exact, by two histograms of magnitudes, never a sort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from simmerge_ray.merging.engine import kernels
from simmerge_ray.merging.graph import Apply

# For each source the upper bits of the magnitude that is looked for, and how many magnitudes have larger ones.
Tops = Sequence[tuple[int, int]]
NUM_HIGH, NUM_LOW = 1 << 15, 1 << 16  # bins of `kernels.count_high` and `count_low`
NOT_FINITE = 0x7F80  # upper bits of the first magnitude that is infinite or NaN


@dataclass
class Trim:
    """Bits of the threshold's magnitude for each source (uint32), and how many entries equal to it are kept (int64).

    counted: whether the magnitudes were counted, so that NaN and infinity were seen. left: of the budgets, in a pass
    over the tensor. kept: base and task vectors of a small tensor's blocks, by offset, so that later passes need not
    read again.
    """

    thresholds: np.ndarray
    budgets: np.ndarray
    counted: bool
    kept: dict[int, tuple[np.ndarray, ...]] = field(default_factory=dict)
    left: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def restart(self) -> None:
        """Begin a pass over the tensor."""
        self.left = self.budgets.copy()


def densities(node: Apply) -> tuple[float, ...]:
    """The density of a TIES step for each of its sources."""
    density = dict(node.params).get("density", 0.5)
    return density if isinstance(density, tuple) else (float(density),) * len(node.sources)


def top_bins(high: np.ndarray, keep: Sequence[int]) -> Tops:
    """`Tops` of the `keep`-th largest magnitude of every source."""
    return [kernels.bin_of(counts, count) for counts, count in zip(high, keep, strict=True)]


def exact_thresholds(tops: Tops, low: np.ndarray, keep: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(bits of the `keep`-th largest magnitude, how many entries equal to it are kept) of every source.

    low: counts of the lower bits in the bins `tops`.
    """
    thresholds, budgets = np.zeros(len(keep), dtype=np.uint32), np.zeros(len(keep), dtype=np.int64)
    for number, ((top, above), counts, count) in enumerate(zip(tops, low, keep, strict=True)):
        bits, above_low = kernels.bin_of(counts, count - above)
        thresholds[number] = (top << 16) | bits
        budgets[number] = count - above - above_low
    return thresholds, budgets
