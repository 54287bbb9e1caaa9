"""Objectives and Pareto fronts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.search.objectives import pareto_front, parse_objective

UTILITIES = {"code": 0.2, "math": 0.8, "rag": 0.5}


@pytest.mark.parametrize(
    ("text", "value", "tasks"),
    [
        ("mean", 0.5, None),
        ("worst", 0.2, None),
        ("math", 0.8, ("math",)),
        ("math=3, code=1", (3 * 0.8 + 0.2) / 4, ("math", "code")),
    ],
)
def test_values(text, value, tasks):
    objective = parse_objective(text, UTILITIES)
    assert objective.value(UTILITIES) == pytest.approx(value) and objective.tasks == tasks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maths", "unknown task 'maths'.*did you mean 'math'"),
        ("math=0", "must be a positive number, got '0'"),
        ("math=x", "must be a positive number, got 'x'"),
        ("math=inf", "must be a positive number"),
        ("math,math", "names a task twice"),
        ("", "unknown task ''"),
    ],
)
def test_malformed_objectives_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_objective(text, UTILITIES)


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 2), min_size=1, max_size=20))
def test_the_front_holds_exactly_what_nothing_dominates(points):
    front = pareto_front(points)
    for index, point in enumerate(points):
        dominated = any(all(np.greater_equal(other, point)) and any(np.greater(other, point)) for other in points)
        assert (index in front) != dominated
    assert front
