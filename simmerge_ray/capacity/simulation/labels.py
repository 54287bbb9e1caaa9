"""The labels: merges and checkpoints, each loaded into a live engine and evaluated."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.capacity.placement import engine_needs, gpu_offer, how_many_fit
from simmerge_ray.capacity.simulation.costs import UnitCosts
from simmerge_ray.capacity.simulation.workers import Node, Phase, make_workers
from simmerge_ray.capacity.simulation.workload import Workload
from simmerge_ray.capacity.size import ModelSize
from simmerge_ray.merging.write.tensors import MAX_THREADS
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, Arm


@dataclass(frozen=True)
class Engines:
    """ranks: GPUs of an engine, 0 on CPUs. cpus: cores of a rank. per_node: engines at once. gpu_gb: of each GPU."""

    ranks: int
    cpus: float
    engine_bytes: float
    per_node: int
    gpu_gb: int = 0


def place_engines(model: ModelSize, resources: Mapping[str, float], gpu_gb: int, cpus: float) -> Engines:
    """Engines on the fewest GPUs that hold them, with the cores that come with these; on CPUs by cores and memory.
    cpus: cores of an engine on CPUs. Raises ConfigError: a node holds none."""
    gpus, held = int(resources.get("GPU", 0)), model.engine_bytes
    if not gpus:
        fit = how_many_fit(engine_needs(held, cpus, 0.0), resources)
        if not fit:
            raise ConfigError(
                f"an engine of {held / 1e9:.1f} GB and {cpus:g} cores does not fit a node of "
                f"{resources['memory'] / 1e9:.0f} GB and {resources['CPU']:g} cores"
            )
        return Engines(0, cpus, held, fit)
    offer, cpus = dict(resources) | gpu_offer(gpu_gb, gpus), float(int(resources["CPU"]) // gpus)
    for ranks in (2**power for power in range(gpus.bit_length())):
        try:
            needs = engine_needs(held, cpus, 1.0, ranks, offer)
        except ConfigError:
            needs = {}
        if needs and (fit := how_many_fit({kind: ranks * amount for kind, amount in needs.items()}, offer)):
            return Engines(ranks, cpus, held, fit, gpu_gb)
    raise ConfigError(f"an engine of {held / 1e9:.1f} GB does not fit {gpus} GPUs of {gpu_gb} GB, the most of one node")


@dataclass(frozen=True)
class Merge:
    """What one trial loads: checkpoints, and by which arm (None: one checkpoint as it is); and on how many tasks."""

    members: tuple[str, ...]
    arm: Arm | None
    tasks: int


def make_trials(workload: Workload) -> list[Merge]:
    """The base and all checkpoints on all tasks, then merges with every arm on their members' tasks: of pairs whose
    tasks differ, or of all sets of more. The tasks go round. Raises ConfigError: more ways than checkpoints or than an
    arm takes, or more than two without `max_merges`."""
    num_models, tasks, arms = workload.num_models, workload.tasks, workload.arms
    ways, most = workload.ways, workload.max_merges
    if ways > num_models:
        raise ConfigError(f"merges of {ways} of {num_models} checkpoints")
    if ways > 2 and most is None:
        raise ConfigError(f"say how many merges of {ways} checkpoints are measured (--merges); all are too many")
    for arm in arms:
        spec = OPERATOR_SPECS[arm.operator]
        if ways < spec.min_sources or (spec.max_sources is not None and ways > spec.max_sources):
            raise ConfigError(f"{arm.label} does not merge {ways} checkpoints")
    own = [number % tasks for number in range(num_models)]
    merges = (
        Merge(tuple(f"m{one}" for one in members), arm, len({own[one] for one in members}))
        for members in itertools.combinations(range(num_models), ways)
        if ways > 2 or tasks == 1 or own[members[0]] != own[members[1]]
        for arm in arms
    )
    alone = [Merge((name,), None, tasks) for name in ("base", *(f"m{number}" for number in range(num_models)))]
    return [*alone, *itertools.islice(merges, most)]


def simulate_labels(
    workload: Workload, trials: Sequence[Merge], engines: Engines, nodes: Sequence[Node], costs: UnitCosts
) -> Phase:
    """Trials in order, each on its tasks' items, from the first engine's start to the last label."""
    seconds = [generation_seconds(workload, engines, trial.tasks * workload.items, costs) for trial in trials]
    return simulate_trials("labels", workload.model, list(zip(trials, seconds, strict=True)), engines, nodes, costs)


def simulate_trials(
    name: str,
    model: ModelSize,
    trials: Sequence[tuple[Merge, float]],
    engines: Engines,
    nodes: Sequence[Node],
    costs: UnitCosts,
) -> Phase:
    """Trials in order, each on the engine that is free first; every engine first copies and loads one checkpoint.

    Args:
        name: of the phase. trials: with the seconds for which an engine evaluates each.
    """
    before = sum(node.network_bytes for node in nodes)
    workers = make_workers(min(engines.per_node * len(nodes), len(trials)), nodes)
    ranks = max(1, engines.ranks)
    threads = min(MAX_THREADS, max(1, int(engines.cpus)))
    readers = ranks * threads  # every rank reads the whole merge; what one has read, the others find in memory
    swapped = model.num_bytes / ranks / costs.assumed.swap_bytes_per_s if engines.ranks else 0.0
    waiting: list[tuple[float, int]] = []
    first = trials[0][0].members[:1]
    for node in nodes:
        node.begin()
    for worker in workers:
        read = worker.node.read_all(first, model.num_bytes, 0.0, readers=readers)
        begun = worker.spend(**read, **{"starting engines": costs.of("engine_start_s")})
        heapq.heappush(waiting, (begun, worker.number))
    end = 0.0
    for trial, evaluating in trials:
        now, number = heapq.heappop(waiting)
        worker = workers[number]
        read = worker.node.read_all(trial.members, model.num_bytes, now, readers=readers)
        # Every rank streams the whole merge and keeps its share.
        merge_ns = costs.merge_ns(trial.arm, len(trial.members)) if trial.arm else 0.0
        own = {
            "merging": model.parameters * merge_ns * 1e-9 / threads,
            "swapping weights": swapped,
            "evaluating": evaluating,
            "Ray Tune": costs.of("trial_s"),
        }
        took = worker.spend(**read, **own)
        end = max(end, now + took)
        heapq.heappush(waiting, (now + took, number))
    network = sum(node.network_bytes for node in nodes) - before
    return Phase.of(name, "engines", workers, len(trials), end, network)


def generation_seconds(workload: Workload, engines: Engines, num_items: int, costs: UnitCosts) -> float:
    """Of one engine that answers so many items: prompts by arithmetic, answers by what every token reads."""
    model, prompt, answer = workload.model, workload.prompt_tokens, workload.answer_tokens
    if not engines.ranks:
        flops = 2 * model.parameters * (prompt + answer) / (engines.cpus * costs.of("core_flops"))
        return num_items * max(costs.of("item_s") / engines.cpus, flops)
    gpu, assumed = costs.assumed.gpus[engines.gpu_gb], costs.assumed
    compute = engines.ranks * gpu.tflops * 1e12 * assumed.prefill_utilisation
    step = model.num_bytes / (engines.ranks * gpu.tbytes_per_s * 1e12 * assumed.decode_utilisation)
    return (
        2 * model.parameters * prompt * num_items / compute + math.ceil(num_items / assumed.batch_size) * answer * step
    )


def cache_holds(cache_bytes: float, model: ModelSize, ways: int) -> bool:
    """Whether a node's cache keeps the members of a merge, so that the next arm finds them there."""
    return cache_bytes >= ways * model.num_bytes
