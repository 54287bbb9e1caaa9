"""Loops over samples and outputs that NumPy would walk several times: float32 in, sums in float64, without the GIL."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def add_scaled(total: np.ndarray, share: float, values: np.ndarray) -> None:
    """`total += share * values`, every product and sum rounded. total: (N,) float64. values: (N,) float32."""
    for k in range(len(total)):
        total[k] += share * np.float64(values[k])


@njit(cache=True, nogil=True)
def add_scaled_difference(total: np.ndarray, share: float, values: np.ndarray, centre: np.ndarray) -> None:
    """`total += share * (values - centre)`, the difference in float32. total: (N,) float64. Others: (N,) float32."""
    for k in range(len(total)):
        total[k] += share * np.float64(values[k] - centre[k])


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def row_dots(left: np.ndarray, right: np.ndarray, dots: np.ndarray) -> None:
    """Inner products of the rows of two (N, D) float32 arrays, in float64. dots: (N,)."""
    for row in range(len(dots)):
        total = 0.0
        for k in range(left.shape[1]):
            total += np.float64(left[row, k]) * np.float64(right[row, k])
        dots[row] = total


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def row_divergences(
    left_log: np.ndarray, left: np.ndarray, right_log: np.ndarray, right: np.ndarray, both: np.ndarray
) -> None:
    """`sum_v P(v) (log P(v) - log Q(v))` of the rows of two distributions (S, V), both ways.

    Logarithms are subtracted before anything is summed, so that near distributions lose no digits.

    Args:
        left_log, right_log: log-probabilities. left, right: probabilities; all float64. both: (2, S), of left from
            right and of right from left.
    """
    for row in range(both.shape[1]):
        there, back = 0.0, 0.0
        for k in range(left.shape[1]):
            difference = right_log[row, k] - left_log[row, k]
            there -= left[row, k] * difference
            back += right[row, k] * difference
        both[0, row] = max(there, 0.0)
        both[1, row] = max(back, 0.0)
