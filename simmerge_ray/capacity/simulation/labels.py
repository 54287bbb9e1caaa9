"""The labels: merges and checkpoints, each loaded into a live engine and evaluated."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.capacity.placement import engine_needs, gpu_offer, how_many_fit
from simmerge_ray.capacity.simulation.costs import Gpu, UnitCosts
from simmerge_ray.capacity.simulation.workers import Node, Worker, total_seconds
from simmerge_ray.capacity.size import ModelSize
from simmerge_ray.merging.write.tensors import MAX_THREADS
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS, Arm


@dataclass(frozen=True)
class Engines:
    """ranks: GPUs of an engine, 0 on CPUs. cpus: cores of a rank. per_node: engines at the same time."""

    ranks: int
    cpus: float
    engine_bytes: float
    per_node: int


def place_engines(model: ModelSize, resources: Mapping[str, float], gpu_gb: int, cpus: float) -> Engines:
    """Engines on the fewest GPUs that hold them, with the cores that come with these; on CPUs by cores and memory.

    Args:
        cpus: cores of an engine on CPUs.

    Raises:
        ConfigError: a node holds none.
    """
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
    ranks = 1
    while ranks <= gpus:
        try:
            needs = engine_needs(held, cpus, 1.0, ranks, offer)
        except ConfigError:
            needs = {}
        if needs and (fit := how_many_fit({kind: ranks * amount for kind, amount in needs.items()}, offer)):
            return Engines(ranks, cpus, held, fit)
        ranks *= 2
    raise ConfigError(f"an engine of {held / 1e9:.1f} GB does not fit {gpus} GPUs of {gpu_gb} GB, the most of one node")


@dataclass(frozen=True)
class Merge:
    """What one trial loads: checkpoints, and by which arm (None: one checkpoint as it is); and on how many tasks."""

    members: tuple[str, ...]
    arm: Arm | None
    tasks: int


def make_trials(num_models: int, tasks: int, arms: Sequence[Arm], ways: int, most: int | None) -> list[Merge]:
    """The base and all checkpoints on all tasks, then merges with every arm on their members' tasks: of pairs whose
    tasks differ, or of all sets of more. The tasks go round.

    Args:
        most: merges at most.

    Raises:
        ConfigError: more ways than checkpoints or than an arm takes, or more than two without `most`.
    """
    if ways > num_models:
        raise ConfigError(f"merges of {ways} of {num_models} checkpoints")
    if ways > 2 and most is None:
        raise ConfigError(f"say how many merges of {ways} checkpoints are measured (--merges); all are too many")
    for arm in arms:
        spec = OPERATOR_SPECS[arm.operator]
        if ways < spec.min_sources or (spec.max_sources is not None and ways > spec.max_sources):
            raise ConfigError(f"{arm.label} does not merge {ways} checkpoints")
    own = [number % tasks for number in range(num_models)]
    sets = (
        members
        for members in itertools.combinations(range(num_models), ways)
        if ways > 2 or tasks == 1 or own[members[0]] != own[members[1]]
    )
    merges = (
        Merge(tuple(f"m{one}" for one in members), arm, len({own[one] for one in members}))
        for members in sets
        for arm in arms
    )
    alone = [Merge((name,), None, tasks) for name in ("base", *(f"m{number}" for number in range(num_models)))]
    return [*alone, *itertools.islice(merges, most)]


@dataclass(frozen=True)
class LabelRun:
    """Seconds from the first engine's start to the last label; engine seconds by what for; bytes over the network."""

    seconds: float
    causes: Mapping[str, float]
    trials: int
    network_bytes: float
    engines: int


def simulate_labels(
    model: ModelSize,
    trials: Sequence[Merge],
    engines: Engines,
    nodes: Sequence[Node],
    gpu: Gpu | None,
    items: int,
    prompt_tokens: int,
    answer_tokens: int,
    costs: UnitCosts,
) -> LabelRun:
    """Trials in order, each on the engine that is free first; every engine first copies and loads one checkpoint."""
    count = min(engines.per_node * len(nodes), len(trials))
    workers = [Worker(number, nodes[number % len(nodes)]) for number in range(count)]
    size, ranks = model.num_bytes, max(1, engines.ranks)
    threads = min(MAX_THREADS, max(1, int(engines.cpus)))
    readers = ranks * threads  # every rank reads the whole merge; what one has read, the others find in memory
    waiting: list[tuple[float, int]] = []
    for worker in workers:
        link, disk = worker.node.read(trials[0].members[0], size, 0.0, readers=readers)
        start = costs.of("engine_start_s")
        begun = worker.spend(**{"reading from the store": link, "reading from disks": disk, "starting engines": start})
        heapq.heappush(waiting, (begun, worker.number))
    end = 0.0
    for trial in trials:
        now, number = heapq.heappop(waiting)
        worker = workers[number]
        link = disk = 0.0
        for member in trial.members:
            on_link, on_disk = worker.node.read(member, size, now + link + disk, readers=readers)
            link, disk = link + on_link, disk + on_disk
        generated = generation_seconds(model, engines, gpu, trial.tasks * items, prompt_tokens, answer_tokens, costs)
        swapped = size / ranks / costs.assumed.swap_bytes_per_s if engines.ranks else 0.0
        # Every rank streams the whole merge and keeps its share.
        merge_ns = costs.merge_ns(trial.arm, len(trial.members)) if trial.arm else 0.0
        merged = model.parameters * merge_ns * 1e-9 / threads
        took = worker.spend(
            **{
                "reading from the store": link,
                "reading from disks": disk,
                "merging": merged,
                "swapping weights": swapped,
                "evaluating": generated,
                "Ray Tune": costs.of("trial_s"),
            }
        )
        end = max(end, now + took)
        heapq.heappush(waiting, (now + took, number))
    network = sum(node.network_bytes for node in nodes)
    return LabelRun(end, total_seconds(workers), len(trials), network, count)


def generation_seconds(
    model: ModelSize, engines: Engines, gpu: Gpu | None, items: int, prompt: int, answer: int, costs: UnitCosts
) -> float:
    """Of one engine that answers so many items: prompts by arithmetic, answers by what every token reads."""
    if gpu is None:
        flops = 2 * model.parameters * (prompt + answer) / (engines.cpus * costs.of("core_flops"))
        return items * max(costs.of("item_s") / engines.cpus, flops)
    assumed = costs.assumed
    prefill = 2 * model.parameters * prompt * items / (engines.ranks * gpu.tflops * 1e12 * assumed.prefill_utilisation)
    step = model.num_bytes / (engines.ranks * gpu.tbytes_per_s * 1e12 * assumed.decode_utilisation)
    return prefill + math.ceil(items / assumed.batch_size) * answer * step


def cache_holds(cache_bytes: float, model: ModelSize, ways: int) -> bool:
    """Whether a node's cache keeps the members of a merge, so that the next arm finds them there."""
    return cache_bytes >= ways * model.num_bytes
