"""Does cumulative regret still flatten? A policy that does not learn has a straight line."""

from __future__ import annotations

import numpy as np

from simmerge_ray.service.schemas import AlarmState

MIN_ROUNDS = 30
NUM_RESAMPLES = 500
_BLOCK = 5


def regret_slope(regret: np.ndarray) -> AlarmState | None:
    """Slope of log cumulative regret in log rounds, of the regret (T,) against best fixed or the oracle, with 95 %.

    None below `MIN_ROUNDS`, or where there is no regret in sum (nothing to be alarmed about). The interval is by giving
    blocks of rounds random weights in their place: regret of neighbours is not independent.
    """
    if len(regret) < MIN_ROUNDS or regret.sum() <= 0:
        return None
    generator = np.random.default_rng(0)
    num_blocks = len(regret) // _BLOCK
    blocks = regret[: num_blocks * _BLOCK].reshape(num_blocks, _BLOCK).sum(1)
    slope = _slope(blocks)
    if slope is None:
        return None
    # Poisson weights keep every block in its place, so the shape of the curve is that of the sample.
    every = (_slope(blocks * generator.poisson(1.0, num_blocks)) for _ in range(NUM_RESAMPLES))
    drawn = [one for one in every if one is not None]
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (-np.inf, np.inf)
    # The interval contains 1, or lies above: the alarm. A policy that learns has about 1/2.
    return AlarmState(linear=bool(high >= 1.0), slope=slope, low=float(low), high=float(high))


def _slope(blocks: np.ndarray) -> float | None:
    """Least squares over the curve without its first third, which says how fast a policy starts."""
    total = np.cumsum(blocks)
    rounds = np.arange(1, len(blocks) + 1)
    used = (rounds >= len(blocks) // 3) & (total > 0)
    if used.sum() < 3:
        return None
    x, y = np.log(rounds[used]), np.log(total[used])
    return float(np.polyfit(x, y, 1)[0])
