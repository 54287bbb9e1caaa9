"""Functions as Ray tasks: results in finish order, errors of their own type, calls that are added on the way."""

from __future__ import annotations

import time
from collections import deque

import pytest

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.on_ray.tasks import in_background, run_tasks

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def slept(shared: int, seconds: float) -> float:
    time.sleep(seconds)
    return shared + seconds


def failing(number: int) -> int:
    if number == 1:
        raise CheckpointError("unreadable")
    return number


def test_results_come_in_finish_order_and_calls_may_be_added():
    calls, seen = deque([(2.0,), (0.0,)]), []
    waits: list[float] = []
    for (seconds,), result in run_tasks(
        slept, calls, shared=(1,), on_wait=lambda: waits.append(time.monotonic()), num_cpus=0.1
    ):
        seen.append(seconds)
        assert result == 1 + seconds
        if seconds == 0.0:
            calls.append((0.1,))
    assert seen == [0.0, 0.1, 2.0]


def test_no_more_calls_run_at_a_time_than_asked():
    calls = deque([(0.4,), (0.0,)])
    assert [seconds for (seconds,), _ in run_tasks(slept, calls, shared=(0,), max_running=1)] == [0.4, 0.0]


def test_an_error_has_its_own_type_or_is_handed_over():
    with pytest.raises(CheckpointError, match="unreadable"):
        list(run_tasks(failing, deque([(1,)])))
    errors = []
    results = run_tasks(failing, deque([(1,), (2,)]), on_error=lambda call, error: errors.append((call, str(error))))
    assert list(results) == [((2,), 2)] and errors == [((1,), "unreadable")]


def test_a_call_in_the_background():
    with in_background(failing, 3) as result:
        assert result() == 3
    with pytest.raises(CheckpointError, match="unreadable"), in_background(failing, 1) as result:
        result()
