"""The simulation against what was measured, against the real units of work, and its laws."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.capacity.simulation import Pool, Workload, load_costs, make_pool, simulate
from simmerge_ray.capacity.simulation.labels import (
    Engines,
    Merge,
    cache_holds,
    generation_seconds,
    make_trials,
    place_engines,
    simulate_labels,
)
from simmerge_ray.capacity.simulation.signals import Placed, SignalSimulation, place_workers
from simmerge_ray.capacity.simulation.workers import Node
from simmerge_ray.capacity.size import SHAPES, ModelSize, size_of
from simmerge_ray.plans.operators.specs import parse_arms
from simmerge_ray.signals.stages import LayerRange

COSTS = load_costs()
ARMS = parse_arms(["linear", "ties"])
SMOL = SHAPES[0]
HERE = 1e15  # bytes a second of files that are on this machine already


def signals(workload, workers=1, cores=1):
    placed = Placed((LayerRange(0, workload.model.layers, workload.model.layers),), 1e9, workers)
    return SignalSimulation(workload, placed, [Node(HERE, HERE, HERE)], cores, COSTS).run().phases


@pytest.mark.parametrize(("num_models", "measured"), [(2, 31.7), (4, 47.3), (8, 85.7), (16, 155)])
def test_signals_of_smollm2_take_what_was_measured(num_models, measured):
    """benchmarks/README.md, "Signals": two threads."""
    phases = signals(Workload(SMOL, num_models, 1, ARMS), workers=2, cores=2)
    assert sum(phase.seconds for phase in phases) == pytest.approx(measured, rel=0.1)


def test_a_search_of_201_trials_takes_what_was_measured():
    """benchmarks/README.md, "200 trials": 189 s with two engines on the demo zoo."""
    demo = ModelSize(
        name="demo",
        parameters=3.5e5,
        layers=4,
        hidden_size=64,
        heads=4,
        intermediate_size=128,
        vocab_size=256,
        tied=True,
    )
    trials = [Merge(("m0",), None, 4)] * 13 + [Merge(("m0", "m1"), ARMS[0], 2)] * 188
    workload = Workload(demo, 13, 4, ARMS, prompt_tokens=20, answer_tokens=4)
    run = simulate_labels(workload, trials, Engines(0, 1.0, 1e9, 2), [Node(HERE, HERE, HERE)], COSTS)
    assert run.units == 201 and run.seconds == pytest.approx(189, rel=0.2)


def test_the_units_are_those_of_a_real_run(catalogue, catalogue_path):
    from simmerge_ray.checkpoints.probes import load_probe_sets
    from simmerge_ray.signals.compute import compute_signals, local_executor
    from simmerge_ray.signals.signature import SignatureSpec

    run, kinds = local_executor(catalogue), []

    def counting(queue):
        for index, result in run(queue):
            kinds.append(queue.units[index].kind)
            yield index, result

    probes = load_probe_sets(catalogue_path.parent / "probes")
    compute_signals(catalogue, probes, SignatureSpec(), executor=counting)
    sizes = {len(one.probes) for one in probes.values()}
    assert len(sizes) == 1
    tiny = ModelSize(
        name="tiny", parameters=6e4, layers=2, hidden_size=64, heads=2, intermediate_size=96, vocab_size=50, tied=True
    )
    workload = Workload(tiny, len(catalogue.checkpoints), len(probes), ARMS, probes=sizes.pop(), probe_tokens=20)
    units = {phase.name: phase.units for phase in signals(workload)}
    assert units["continuations"] == kinds.count("continuation")
    assert units["signatures"] == kinds.count("outputs") + kinds.count("sample")
    assert units["sums"] == kinds.count("sums")


def test_the_merges_are_the_pairs_of_the_search(catalogue):
    tasks = sorted(set(catalogue.own_task.values()))
    expected = len(catalogue.pairs("cross-task")) * len(ARMS)
    own = [catalogue.own_task[ref.id] for ref in catalogue.checkpoints]
    assert own == [tasks[number % len(tasks)] for number in range(len(own))]  # as `make_trials` deals them
    trials = make_trials(Workload(SMOL, len(own), len(tasks), ARMS))
    assert sum(trial.arm is not None for trial in trials) == expected
    assert sum(trial.arm is None for trial in trials) == len(catalogue.all_refs)


def test_merges_of_more_ways_have_distinct_members():
    trials = [one for one in make_trials(Workload(SMOL, 9, 3, ARMS, 4, 30)) if one.arm]
    assert len(trials) == 30 and all(len(set(one.members)) == 4 for one in trials)
    assert len({(one.members, one.arm) for one in trials}) == 30
    with pytest.raises(ConfigError, match="--merges"):
        make_trials(Workload(SMOL, 9, 3, ARMS, 4))
    with pytest.raises(ConfigError, match="merges of 10 of 9"):
        make_trials(Workload(SMOL, 9, 3, ARMS, 10, 5))
    with pytest.raises(ConfigError, match="slerp does not merge 3 checkpoints"):
        make_trials(Workload(SMOL, 9, 3, parse_arms(["slerp"]), 3, 5))


@pytest.mark.parametrize("parameters", [1.3e8, 1.2e9, 7.6e9, 7.06e10, 1.11e11])
def test_workers_fit_their_node_and_use_its_cores(parameters):
    pool = make_pool("r7i.4xlarge", 1, COSTS)
    placed, model = place_workers(size_of(parameters), pool.resources), size_of(parameters)
    assert placed.per_node * placed.worker_bytes <= pool.resources["memory"]
    assert placed.per_node <= pool.resources["CPU"]
    assert [stage.first for stage in placed.stages[1:]] == [stage.last for stage in placed.stages[:-1]]
    assert placed.stages[0].is_first and placed.stages[-1].is_last
    assert all(4 * model.elements(stage) < placed.worker_bytes for stage in placed.stages)


def test_engines_take_the_fewest_gpus_that_hold_them():
    ranks = {}
    for parameters in (1.236e9, 7.6e9, 70.6e9, 111e9):
        pool = make_pool("p5.48xlarge", 1, COSTS)
        engines = place_engines(size_of(parameters), pool.resources, pool.gpu_gb, 1.0)
        ranks[parameters] = engines.ranks
        assert engines.engine_bytes / engines.ranks <= 0.9 * 80e9
        assert engines.ranks == 1 or engines.engine_bytes / (engines.ranks / 2) > 0.9 * 80e9
        assert engines.per_node == 8 // engines.ranks
    assert ranks == {1.236e9: 1, 7.6e9: 1, 70.6e9: 4, 111e9: 8}
    with pytest.raises(ConfigError, match="does not fit 8 GPUs of 80 GB"):
        pool = make_pool("p5.48xlarge", 1, COSTS)
        place_engines(size_of(400e9), pool.resources, pool.gpu_gb, 1.0)


def test_labels_of_one_engine_follow_the_formula_of_the_docs():
    """docs/cluster.md, "What it costs": reading, merging, swapping and evaluating, trial by trial."""
    workload = Workload(size_of(7.6e9), 6, 2, ARMS)
    engines = Engines(1, 4.0, workload.model.engine_bytes, 1, gpu_gb=80)
    trials = [Merge(("m0", "m1"), arm, 2) for arm in parse_arms(["linear", "ties", "nuslerp"])]
    run = simulate_labels(workload, trials, engines, [Node(1e9, 20e9, 1e15, 5e9)], COSTS)
    size, items = 2 * 7.6e9, 2 * 400
    evaluated = items * 2 * 7.6e9 * 300 / (989e12 * 0.4) + 4 * 100 * size / (3.35e12 * 0.6)
    each = size / 2e10 + evaluated + 0.02
    expected = 17.8 + size / 1e9  # the engine, and the checkpoint that it starts with
    expected += size / 20e9 + size / 1e9  # the first merge: one member is in the cache
    expected += 2 * 2 * size / 20e9  # the others: both are; four threads read
    expected += 7.6 * (1.75 + 7.86 + 2.94) / 4 + 3 * each
    assert run.seconds == pytest.approx(expected, rel=1e-9)
    assert run.network_bytes == pytest.approx(2 * size)
    assert sum(run.causes.values()) == pytest.approx(run.seconds)


def test_a_cache_that_holds_no_merge_costs_the_network_every_time():
    workload = Workload(size_of(7.6e9), 6, 2, ARMS, items=10, prompt_tokens=10, answer_tokens=10)
    model, trials = workload.model, [Merge(("m0", "m1"), ARMS[0], 2)] * 3
    fetched = []
    for room in (0.5, 1.5, 2.0):
        node = Node(1e9, 2.5e9, room * model.num_bytes, pieces=64)
        assert cache_holds(node.cache_bytes, model, 2) == (room >= 2)
        simulate_labels(workload, trials, Engines(2, 1.0, 1e9, 1, gpu_gb=80), [node], COSTS)
        fetched.append(node.network_bytes / model.num_bytes)
    assert fetched[2] == pytest.approx(2) and fetched[0] == pytest.approx(7)
    assert 2 < fetched[1] <= fetched[0]


@given(st.integers(1, 500), st.integers(1, 400), st.integers(0, 200))
def test_evaluation_grows_with_items_and_tokens(items, prompt, answer):
    for gpus in (1, 0):
        engines = Engines(gpus, 1.0, 1e9, 1, gpu_gb=80)

        def seconds(items, prompt, engines=engines):
            return generation_seconds(small(prompt_tokens=prompt, answer_tokens=answer), engines, items, COSTS)

        assert 0 < seconds(items, prompt) <= seconds(items + 1, prompt)
        assert seconds(items, prompt) < seconds(items, prompt + 1)


def small(**changes):
    return replace(Workload(size_of(7.6e9), 6, 2, ARMS, max_merges=12), **changes)


def run(workload, signal_nodes=2, engine_nodes=1, **changes):
    pools = [make_pool("r7i.4xlarge", signal_nodes, COSTS), make_pool("p5.48xlarge", engine_nodes, COSTS)]
    return simulate(workload, *(replace(pool, **changes) for pool in pools), COSTS)


@settings(max_examples=3)
@example(2, 2)  # five engines on four nodes find less in their neighbours' caches than on two
@given(st.integers(2, 8), st.integers(1, 4))
def test_more_nodes_take_no_longer_and_all_bytes_come_at_least_once(num_models, nodes):
    workload = small(num_models=num_models)
    few, many = run(workload, nodes, nodes), run(workload, 2 * nodes, 2 * nodes)
    # Schedules are greedy, and what an engine's neighbours have fetched is in its node's cache already: with more nodes
    # a part may take longer, labels by no more than it takes to fetch the members of a merge.
    assert many.seconds <= 1.05 * few.seconds
    link = make_pool("p5.48xlarge", 1, COSTS).link
    assert many.phases[-1].seconds <= few.phases[-1].seconds + workload.ways * workload.model.num_bytes / link
    assert few.phases[0].network_bytes >= (num_models + 1) * workload.model.num_bytes * 0.999


def test_dollars_are_node_hours_times_prices():
    found, dearer = run(small()), run(small(), dollars=100.0)
    assert found.dollars["engines"] == pytest.approx(found.node_hours("engines") * 55)
    assert found.gpu_hours == pytest.approx(8 * found.node_hours("engines"))
    labels = found.phases[-1]
    assert found.node_hours("engines") == pytest.approx(labels.seconds / 3600)
    assert dearer.dollars["signals"] == pytest.approx(100 * found.node_hours("signals"))
    assert found.dollars["head"] == pytest.approx(found.seconds / 3600 * 0.2)
    assert found.bottleneck.seconds == max(phase.seconds for phase in found.phases)


def test_a_model_that_no_node_holds_is_an_error():
    pool = make_pool("m7i.xlarge", 1, COSTS)
    with pytest.raises(ConfigError, match="no node of 12 GB holds a signal worker"):
        place_workers(size_of(111e9), pool.resources)
    with pytest.raises(ConfigError, match="unknown machine 'r7i'"):
        make_pool("r7i", 1, COSTS)
    assert isinstance(pool, Pool)
