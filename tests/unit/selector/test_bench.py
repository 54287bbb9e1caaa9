"""The bench that policies are measured on: intervals from kept sums are those of the definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.selector.assessment.bench import Bench, NoiseSets
from simmerge_ray.selector.data.scoring import GAP_CLOSED, Scoring


def bench_of(num: int, num_tasks: int, seed: int) -> Bench:
    """Made up; some samples hold no context of a task, some none at all."""
    generator = np.random.default_rng(seed)
    tasks = np.array([f"t{i}" for i in generator.integers(num_tasks, size=num)])
    scoring = Scoring(np.arange(num), tasks, generator.normal(size=(num, 3)), generator.random(num) + 0.1, GAP_CLOSED)
    samples = generator.poisson(0.7, size=(40, num)).astype(float)
    samples[0] = 0
    noise = NoiseSets(generator.random((num, 3)), np.ones((num, 3), bool), 1, 1)
    return Bench(scoring, [[row] for row in range(num)], noise, samples)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 100))
def test_an_interval_is_that_of_the_headline_of_every_sample(num, num_tasks, seed):
    bench = bench_of(num, num_tasks, seed)
    numerators = bench.scoring.closed[:, 0]
    values = [float(bench.scoring.headline(numerators, counts)) for counts in bench.samples]
    known = [value for value in values if not np.isnan(value)]
    found = bench.interval(numerators)
    assert (found is None) == (not known)
    if found is not None:
        np.testing.assert_allclose(found, np.quantile(known, [0.025, 0.975]), rtol=1e-12, atol=1e-12)


def test_a_policy_that_was_tested_on_a_part_is_measured_on_that_part():
    bench = bench_of(12, 3, 0)
    shares = np.tile([1.0, 0.0, 0.0], (12, 1))
    reference = np.tile([0.0, 1.0, 0.0], (12, 1))
    shares[:4] = np.nan
    found, kept = bench.measure(shares, reference), np.arange(4, 12)
    part = bench.scoring.among(kept.tolist())
    gained = part.closed[:, 0] - part.closed[:, 1]
    assert found["gain"] == pytest.approx(float(part.headline(gained)))
    drawn = part.headline(gained, bench.samples[:, kept])
    np.testing.assert_allclose(found["gain_interval"], np.nanquantile(drawn, [0.025, 0.975]))
    for task, one in found["tasks"].items():
        of_task = part.tasks == task
        counts = bench.samples[:, kept][:, of_task]
        ratio = (counts @ part.closed[of_task, 0])[counts.sum(1) > 0] / (counts @ part.gap[of_task])[counts.sum(1) > 0]
        np.testing.assert_allclose(one["interval"], np.quantile(ratio, [0.025, 0.975]))
        assert one["num_contexts"] == of_task.sum()
