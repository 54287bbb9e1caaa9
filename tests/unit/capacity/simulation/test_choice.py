"""A simulated choice without labels: the formulas of the module's docstring, laws, and what it says of memory."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.finding import FindConfig, first_round
from simmerge_ray.capacity.simulation import Workload, load_costs, make_pool
from simmerge_ray.capacity.simulation.choice import ChoiceWork, place_whole, simulate_choice
from simmerge_ray.capacity.simulation.choice_page import choice_json, choice_lines
from simmerge_ray.capacity.size import size_of

COSTS = load_costs()
UNTUNED = ChoiceWork(steps=0)
SEVEN = Workload(size_of(7.6e9), 2, 4, (), probes=64)
LARGE = Workload(size_of(111e9), 2, 4, (), probes=64)


def choice(workload=SEVEN, work=UNTUNED, machine="p5.48xlarge", nodes=1, evaluations=()):
    return simulate_choice(workload, work, make_pool(machine, nodes, COSTS), COSTS, evaluations=evaluations)


def seconds(found):
    return {phase.name: phase.seconds for phase in found.phases}


def arithmetic(found, name, cause="arithmetic"):
    return next(phase for phase in found.phases if phase.name == name).causes[cause]


def test_defaults_are_those_of_auto():
    asked, work = FindConfig(), ChoiceWork()
    assert (work.answer_tokens, work.recipes, work.shortlist) == (asked.max_tokens, asked.num_recipes, asked.num_run(6))
    assert (work.tuned, work.most) == (asked.num_tuned, asked.ways[1])


def test_passes_of_every_checkpoint_over_every_members_answers_follow_the_formula():
    found = choice()
    flops = 2 * 7.6e9 * 64 * (99 + 16) * 2 * 3  # two owners, three checkpoints
    assert arithmetic(found, "passes") == pytest.approx(flops / (67e12 * 0.4))
    one = next(phase for phase in found.phases if phase.name == "passes")
    assert one.units == 2 * 3 * 4  # micro-batches of 16 probes
    generated = 3 * 2 * 7.6e9 * 64 * 115 * 2 / (67e12 * 0.4) + 2 * 4 * 16 * 4 * 7.6e9 / (3.35e12 * 0.6)
    assert arithmetic(found, "answers") == pytest.approx(generated)


def test_the_average_is_one_worker_s_pass_over_all_answers():
    found = choice()
    assert arithmetic(found, "average") == pytest.approx(2 * 7.6e9 * 64 * (99 + 16) * 2 / (67e12 * 0.4))
    assert next(phase for phase in found.phases if phase.name == "average").units == 1


def test_ranking_follows_the_measured_figures():
    found = choice()
    values = 10_000 * 2 * 64 * 16 * 33
    assert seconds(found)["ranking"] == pytest.approx(values * (0.583 + 2 * 0.0833) * 1e-9 / 2)


def test_rounds_over_probes_are_those_of_the_search():
    assert first_round(64, 24) == (21, 8) and first_round(16, 24) == (0, 24) and first_round(64, 3) == (0, 3)
    parts = {phase.name: phase for phase in choice().phases}
    assert parts["candidates, some probes"].units == 24
    assert parts["candidates, all probes"].units == 24 // 3  # what checkpoints and the average keep is known
    four = {phase.name: phase for phase in choice(replace(SEVEN, num_models=4)).phases}
    assert four["candidates, all probes"].units == 24 // 3 + 1  # of four, the average of some was looked at
    few = choice(replace(SEVEN, probes=16))
    assert "candidates, some probes" not in seconds(few)
    evaluating = parts["candidates, some probes"].causes["evaluating"]
    assert evaluating == pytest.approx(24 * 2 * 7.6e9 * 115 * 21 * 2 / (989e12 * 0.4))


def test_no_tuning_costs_nothing_and_steps_cost_alike():
    untuned = seconds(choice())
    assert not [name for name in untuned if name.startswith("tun")]
    few, many, more = (choice(work=ChoiceWork(steps=steps, adapters=True)) for steps in (10, 20, 40))
    first, second, third = (seconds(one)["tuning"] for one in (few, many, more))
    assert third - second == pytest.approx(2 * (second - first)) and second > first
    assert {name: seconds(few)[name] for name in untuned} == pytest.approx(untuned)


def test_a_step_of_tuning_on_a_gpu_follows_the_formula():
    work = ChoiceWork(adapters=True)
    found = choice(work=work)
    assert found.tuner is not None and found.tuner.gpu is not None
    answers = 2 * 2 * 7.6e9 * 64 * 115 * 2 / (67e12 * 0.4) + 2 * 4 * 16 * 4 * 7.6e9 / (3.35e12 * 0.6)
    steps = work.steps * 8 * 7.6e9 * 2 * 64 * 115 / (67e12 * 0.4)  # layers of so large a model are computed twice
    assert arithmetic(found, "tuning") == pytest.approx(answers + steps)
    weights = work.steps * 4 * 7.6e9 * (3 * 2 + 2) / (3.35e12 * 0.6)
    assert arithmetic(found, "tuning", "setting weights") == pytest.approx(weights)


def test_more_members_take_longer_and_cost_more():
    """On one GPU: where as many workers as checkpoints each hold one, one checkpoint more may save reading it again."""
    found = [choice(replace(SEVEN, num_models=count), machine="g6e.4xlarge") for count in (2, 3, 4, 5)]
    for few, many in pairwise(found):
        assert many.seconds(many.phases) > few.seconds(few.phases)
        assert many.dollars(many.phases) > few.dollars(few.phases)
    passes = [arithmetic(one, "passes") for one in found]
    assert passes == pytest.approx([passes[0] * count * (count + 1) / 6 for count in (2, 3, 4, 5)])


def test_twice_the_tokens_are_twice_the_arithmetic():
    work = replace(UNTUNED, answer_tokens=1)
    one, two = (choice(replace(SEVEN, probe_tokens=float(tokens)), work) for tokens in (99, 199))
    assert arithmetic(two, "passes") == pytest.approx(2 * arithmetic(one, "passes"))
    name = "candidates, all probes"
    assert arithmetic(two, name, "evaluating") == pytest.approx(2 * arithmetic(one, name, "evaluating"))


def test_more_measured_merges_take_longer_and_labels_have_their_price():
    found = choice(evaluations=(1, 8, 20, 40))
    times = [found.seconds(phases) for phases in found.measured.values()]
    dollars = [found.dollars(phases) for phases in found.measured.values()]
    assert times == sorted(times) and dollars == sorted(dollars) and len(set(dollars)) == 4
    measured = {count: phases[1].units for count, phases in found.measured.items()}
    assert measured == {count: count + 3 for count in (1, 8, 20, 40)}
    longer = choice(replace(SEVEN, items=800), evaluations=(8,))
    assert longer.seconds(longer.measured[8]) > times[1] and seconds(longer) == seconds(found)


def test_dollars_are_node_hours_times_prices():
    found = choice(nodes=2)
    used = sum(min(2, phase.workers) * phase.seconds for phase in found.phases if phase.place == "engines") / 3600
    assert found.node_hours(found.phases) == pytest.approx(used)
    assert found.dollars(found.phases) == pytest.approx(55 * used + 0.20 * found.seconds(found.phases) / 3600)


def test_a_worker_takes_a_gpu_that_holds_it_else_a_core_else_nothing():
    pool = make_pool("p5.48xlarge", 1, COSTS)
    on_gpu, on_core = place_whole(0.9 * 80e9, pool, COSTS), place_whole(0.91 * 80e9, pool, COSTS)
    assert on_gpu is not None and on_gpu.gpu is not None and on_gpu.per_node == 8
    assert on_core is not None and on_core.gpu is None and on_core.per_node * on_core.held_bytes <= 0.78 * 2048e9
    assert place_whole(2e12, pool, COSTS) is None
    with pytest.raises(ConfigError, match=r"whole in float32, 450 GB, fits no node of g6e.4xlarge"):
        choice(LARGE, machine="g6e.4xlarge")


def test_the_page_says_what_has_no_room():
    text = "\n".join(choice_lines(LARGE, ChoiceWork(), found := choice(LARGE, ChoiceWork())))
    assert "1.8 TB: no node has the memory, left out" in text and "no GPU holds a model whole" in text
    assert choice_json(LARGE, ChoiceWork(), found)["tuning"] == {
        "bytes": found.tuning_bytes,
        "fits": False,
        "gpu": False,
    }
    text = "\n".join(choice_lines(SEVEN, ChoiceWork(), choice(work=ChoiceWork())))
    assert "no GPU holds the tuning: it runs on one core" in text and "no GPU holds a model whole" not in text
    assert "tuning    none" in choice_lines(SEVEN, UNTUNED, choice())


def test_memory_of_tuning_is_what_the_command_states(catalogue, catalogue_path):
    from simmerge_ray.base.config import TuneConfig
    from simmerge_ray.checkpoints.headers import read_headers
    from simmerge_ray.checkpoints.probes import load_probe_sets
    from simmerge_ray.checkpoints.references import read_config
    from simmerge_ray.checkpoints.size import model_shape
    from simmerge_ray.signals.signature import SignatureSpec
    from simmerge_ray.signals.tokens import tokenize_probes
    from simmerge_ray.signals.tuning.memory import rows_of, stated_bytes, tuning_bytes

    config = TuneConfig(max_tokens=4)
    probes = {"add": load_probe_sets(catalogue_path.parent / "probes")["add"]}
    batches = tokenize_probes(catalogue, probes, SignatureSpec(), config.max_tokens)
    width = max(batch.input_ids.shape[1] for batch in batches["add"]) + config.max_tokens
    num_probes = sum(len(batch.input_ids) for batch in batches["add"])
    elements = [math.prod(spec.shape) for spec in read_headers(catalogue.base).values()]
    shape, dense = model_shape(read_config(catalogue.base)), len(catalogue.checkpoints)
    rows = min(num_probes, rows_of(shape, width, config.max_tokens))
    stated = stated_bytes(catalogue, batches, config)
    assert stated == tuning_bytes(sum(elements), max(elements), dense, shape, (rows, width), 4)
