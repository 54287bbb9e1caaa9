"""Nodes and workers of the simulation: laws of caches, links and schedules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.signals.queue import Unit, WorkQueue
from simmerge_ray.simulation.workers import PIECES, Node, Worker, drain


def test_what_a_cache_holds_is_fetched_once():
    node = Node(link=10.0, disk=100.0, cache_bytes=2000.0)
    assert node.read("a", 1000.0, 0.0) == (100.0, 0.0)
    assert node.read("a", 1000.0, 100.0) == (0.0, 10.0)
    assert node.read("b", 1000.0, 100.0) == (100.0, 0.0)
    assert node.network_bytes == 2000.0


def test_what_was_used_last_stays():
    node = Node(link=10.0, disk=100.0, cache_bytes=1000.0)
    node.read("a", 1000.0, 0.0)
    node.read("b", 1000.0, 0.0, 0.0, 0.5)  # the first half of `a` goes
    assert node.read("a", 1000.0, 1000.0, 0.5, 1.0) == (0.0, 5.0)
    assert node.read("a", 1000.0, 1000.0, 0.0, 0.5) == (50.0, 0.0)


def test_workers_of_a_node_wait_for_its_link():
    node = Node(link=10.0, disk=100.0, cache_bytes=0.0)
    assert node.read("a", 100.0, 0.0)[0] == 10.0
    assert node.read("b", 100.0, 0.0)[0] == 20.0  # the link is free after ten seconds
    assert node.read("c", 100.0, 50.0)[0] == 10.0


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20), st.floats(0, 3))
def test_no_more_is_fetched_than_pieces_are_touched_and_no_less_than_once(ranges, room):
    node = Node(link=1.0, disk=1.0, cache_bytes=room * 64.0)
    touched, total = set(), 0
    for one in ranges:
        first, last = sorted(one)
        node.read("a", 64.0, 0.0, first, last)
        pieces = {
            number
            for number in range(PIECES)
            if number <= first * PIECES < number + 1 or first < number / PIECES < last
        }
        touched |= pieces
        total += len(pieces)
    assert len(touched) - 1e-9 <= node.network_bytes <= total + len(ranges) + 1e-9
    if room >= 1:
        assert node.network_bytes <= PIECES


def seconds_of(units, num_workers):
    queue, ran = WorkQueue(), []
    for number, seconds in enumerate(units):
        queue.add(Unit("sample", f"m{number % 3}", (number, seconds)))
    node = Node(1.0, 1.0, 0.0)

    def work(worker, unit, at):
        ran.append(unit.payload[0])
        return worker.spend(work=unit.payload[1])

    workers = [Worker(number, node) for number in range(num_workers)]
    end = drain(queue, workers, work)
    assert sorted(ran) == list(range(len(units)))
    assert sum(worker.seconds.get("work", 0.0) for worker in workers) == pytest.approx(sum(units))
    return end


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=40), st.integers(1, 6))
def test_a_schedule_is_as_long_as_work_and_workers_allow(units, num_workers):
    end = seconds_of(units, num_workers)
    assert max(max(units), sum(units) / num_workers) - 1e-9 <= end
    # Nobody is idle while a unit waits (Graham, 1969: list scheduling).
    assert end <= sum(units) / num_workers + (1 - 1 / num_workers) * max(units) + 1e-9


def test_one_worker_does_all_of_it():
    assert seconds_of([1.0, 2.0, 3.5], 1) == pytest.approx(6.5)


def test_units_that_arrive_later_are_done_too():
    queue = WorkQueue([Unit("sample", "a", (3,))])
    node = Node(1.0, 1.0, 0.0)

    def finished(index, unit):
        if unit.payload[0]:
            queue.add(Unit("sample", "a", (unit.payload[0] - 1,)))

    assert drain(queue, [Worker(0, node), Worker(1, node)], lambda *_: 2.0, finished, start=10.0) == 18.0
