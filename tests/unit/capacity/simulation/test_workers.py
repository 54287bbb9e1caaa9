"""Nodes and workers of the simulation: laws of caches, links and schedules."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmerge_ray.capacity.simulation.workers import Node, Worker, drain
from simmerge_ray.signals.queue import Unit, WorkQueue


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


def test_readers_take_no_more_than_they_can():
    node = Node(link=100.0, disk=100.0, cache_bytes=1e9, one=5.0)
    assert node.read("a", 1000.0, 0.0, readers=4) == (50.0, 0.0)
    assert node.read("a", 1000.0, 50.0, readers=4) == (0.0, 50.0)
    assert node.read("a", 1000.0, 100.0, readers=40) == (0.0, 10.0)  # then it is the disk


def test_a_read_that_is_not_planned_takes_its_share_of_the_link():
    node = Node(link=10.0, disk=100.0, cache_bytes=0.0)
    assert node.read_alone("a", 100.0, 0.0, 1.0, 3) == pytest.approx(30.0)
    assert node.read("b", 100.0, 0.0) == (10.0, 0.0)  # nobody waits for it


@given(st.lists(st.tuples(st.integers(0, 64), st.integers(0, 64)), min_size=1, max_size=20), st.floats(0, 3))
def test_what_is_fetched_is_what_a_cache_of_pieces_misses(ranges, room):
    """Against a list of pieces, the last used at its end."""
    node, kept, fetched = Node(1.0, 1.0, room * 64.0, pieces=64), [], 0
    for one in ranges:
        first, last = sorted(one)
        node.read("a", 64.0, 0.0, first / 64, last / 64)
        for piece in range(first, max(last, first + 1)):
            fetched += piece not in kept
            kept = [other for other in kept if other != piece] + [piece]
            kept = kept[-math.floor(room * 64) :] if room * 64 >= 1 else []
    assert node.network_bytes == pytest.approx(fetched)


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
