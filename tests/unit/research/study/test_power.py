from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from simmerge_ray.base.errors import LabelError
from simmerge_ray.research.study.power import Spread, estimate_spread, simulate_power


def drawn(checkpoint: float, rest: float, num: int = 60) -> tuple[list[float], list[tuple[str, str]]]:
    generator = np.random.default_rng(0)
    effects = generator.standard_normal(num) * checkpoint
    pairs = list(combinations(range(num), 2))
    gains = [3.0 + effects[i] + effects[j] + rest * generator.standard_normal() for i, j in pairs]
    return gains, [(str(i), str(j)) for i, j in pairs]


@pytest.mark.parametrize(("checkpoint", "rest"), [(0.0, 5.0), (4.0, 2.0), (3.0, 10.0)])
def test_the_spread_of_effects_is_found_again(checkpoint, rest):
    spread = estimate_spread(*drawn(checkpoint, rest))
    assert spread.checkpoint == pytest.approx(checkpoint, abs=0.8)
    assert spread.rest == pytest.approx(rest, rel=0.15)


def test_too_few_merges_are_refused():
    with pytest.raises(LabelError, match="at least 10"):
        estimate_spread([1.0] * 9, [("a", "b")] * 9)


def test_error_is_that_of_the_model_and_power_grows():
    spread = Spread(0.0, 0.0, 10.0, 50)
    small, large = (simulate_power(spread, bases, 4, 3.0, 0.0, 300, 200) for bases in (4, 16))
    # Four experts of four domains: six pairs a base, all independent.
    assert small.error == pytest.approx(10 / np.sqrt(24), rel=0.15)
    assert large.error == pytest.approx(10 / np.sqrt(96), rel=0.15)
    assert large.power > small.power
    assert small.half_width > 1.96 * small.error  # the resampling counts noise inside a base twice


def test_without_a_gain_it_is_seldom_found():
    assert simulate_power(Spread(0.0, 2.0, 10.0, 50), 8, 4, 0.0, 2.0, 400, 200).power <= 0.05
