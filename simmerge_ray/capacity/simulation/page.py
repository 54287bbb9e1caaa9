"""A simulated study for people, and as JSON."""

from __future__ import annotations

from typing import Any

from simmerge_ray.capacity.simulation.labels import Engines
from simmerge_ray.capacity.simulation.study import Simulated
from simmerge_ray.capacity.simulation.workers import Phase
from simmerge_ray.capacity.simulation.workload import Pool, Workload
from simmerge_ray.capacity.size import ModelSize

SOURCES = (
    "Times of CPUs, merges and disks are measured (benchmarks/README.md); GPUs, networks and prices are assumed: "
    "`--costs FILE` takes yours."
)
_NAMES = {
    "digests": "digests of the checkpoints",
    "continuations": "the base's continuations",
    "signatures": "signatures",
    "sums": "exact weight sums",
    "pairs": "pairs of signatures",
    "labels": "labels",
}
_REMEDIES = {
    "digests: hashing": "nothing: a checkpoint is hashed by one core; once, and never again",
    "continuations: arithmetic": "nodes that hold a model whole: in stages every token runs all of the text again",
    "continuations: building models": "nodes that hold a model whole: in stages the base is built for every token",
    "labels: merging": "more cores a GPU (`search.cpus_per_trial`), or arms that merge faster than ties",
    "labels: reading from disks": "more engines, or faster disks for the cache; GPUs wait meanwhile",
    "labels: reading from the store": "a cache that holds the members of a merge: SIMMERGE_CACHE_GB, a larger disk",
    "labels: evaluating": "more or faster GPUs, fewer items (`search.max_items`), fewer merges",
}
_BY_CAUSE = {
    "arithmetic": "more nodes for the signals, or nodes with more memory a core, so that every core has a worker",
    "building models": "more nodes for the signals",
    "reading from the store": "nodes with a faster network or a larger cache",
    "reading from disks": "faster disks, more nodes",
    "summing weights": "more nodes for the signals, or `weights: sampled`",
    "sampling weights": "more nodes for the signals",
    "comparing signatures": "it runs on the driver alone",
}


def lines(workload: Workload, found: Simulated) -> list[str]:
    """For a person."""
    longest, dollars = found.bottleneck, found.dollars
    told = [
        *_plan_lines(workload, found),
        "",
        *_phase_lines(found),
        "",
        f"bottleneck  {_NAMES[longest.name]}, {longest.seconds / found.seconds:.0%} of the time; {longest.cause}. "
        f"What helps: {remedy(longest)}",
    ]
    if not found.cache_holds:
        told.append(
            f"warning     the cache of a {found.engine_pool.machine} ({size_text(found.engine_pool.cache_bytes)}) does "
            f"not hold {workload.ways} checkpoints: every merge reads them from the store again"
        )
    needed, room = found.signals.driver_bytes, found.head.resources["memory"]
    if needed > room:
        told.append(
            f"warning     the driver holds {size_text(needed)} while it compares signatures; the head has room for "
            f"{size_text(room)}: take a larger one (--head-machine)"
        )
    told.append(
        f"cost        {_pool('signals', found, found.signal_pool)}; {_pool('engines', found, found.engine_pool)}; head "
        f"${dollars['head']:,.0f}; together ${sum(dollars.values()):,.0f}"
    )
    if found.gpu_hours:
        told.append(f"GPU hours   {found.gpu_hours:,.0f}")
    return [*told, SOURCES]


def _plan_lines(workload: Workload, found: Simulated) -> list[str]:
    model, placed, engines = workload.model, found.placed, found.engines
    cut = "whole" if len(placed.stages) == 1 else f"in {len(placed.stages)} stages of layers"
    return [
        model_line(model),
        f"catalogue {workload.num_models} checkpoints and their base, "
        f"{size_text((workload.num_models + 1) * model.num_bytes)} in the store; "
        f"{workload.tasks} tasks, {len(workload.arms)} arms",
        f"signals   {found.signal_pool.nodes} x {found.signal_pool.machine}, {placed.per_node} workers a node, "
        f"{size_text(placed.worker_bytes)} each, a checkpoint {cut}; "
        f"signature {size_text(found.signals.signature_bytes)}, driver {size_text(found.signals.driver_bytes)}",
        f"engines   {found.engine_pool.nodes} x {found.engine_pool.machine}, {engines.per_node} a node, "
        f"{engine_text(engines)}; an engine {size_text(engines.engine_bytes)}",
    ]


def model_line(model: ModelSize) -> str:
    """What is simulated."""
    return (
        f"model     {model.parameters / 1e9:.4g} B parameters, {model.dtype}, {size_text(model.num_bytes)} each; the "
        f"shape of {model.name}: {model.layers} layers, {model.hidden_size} wide"
    )


def engine_text(engines: Engines) -> str:
    """What one engine has."""
    cores = f"{engines.cpus:g} cores"
    return f"{engines.ranks} GPU{'s' if engines.ranks > 1 else ''} with {cores} each" if engines.ranks else cores


def phase_json(phase: Phase) -> dict[str, Any]:
    """All that is known of a part."""
    return {"worker_seconds" if key == "causes" else key: value for key, value in vars(phase).items()}


def _phase_lines(found: Simulated) -> list[str]:
    network = sum(phase.network_bytes for phase in found.phases)
    return [
        f"{'part':<27}{'where':<9}{'workers':>8}{'units':>9}{'hours':>9}{'network':>10}  most of it",
        *(
            f"{_NAMES[phase.name]:<27}{phase.place:<9}{phase.workers:>8}{phase.units:>9}{_hours(phase.seconds):>9}"
            f"{size_text(phase.network_bytes):>10}  {phase.cause}, {phase.share:.0%}"
            for phase in found.phases
        ),
        f"{'together':<27}{'':<9}{'':>8}{'':>9}{_hours(found.seconds):>9}{size_text(network):>10}",
    ]


def remedy(phase: Phase) -> str:
    """What would make the part shorter."""
    return _REMEDIES.get(f"{phase.name}: {phase.cause}") or _BY_CAUSE.get(phase.cause, "more nodes")


def to_json(workload: Workload, found: Simulated) -> dict[str, Any]:
    """All of it, in bytes, seconds and dollars."""
    return {
        "model": workload.model.model_dump(),
        "models": workload.num_models,
        "signals": {
            "machine": found.signal_pool.machine,
            "nodes": found.signal_pool.nodes,
            "workers_per_node": found.placed.per_node,
            "worker_bytes": found.placed.worker_bytes,
            "stages": len(found.placed.stages),
        },
        "engines": {
            "machine": found.engine_pool.machine,
            "nodes": found.engine_pool.nodes,
            "per_node": found.engines.per_node,
            "gpus": found.engines.ranks,
            "bytes": found.engines.engine_bytes,
        },
        "phases": [phase_json(phase) for phase in found.phases],
        "seconds": found.seconds,
        "bottleneck": found.bottleneck.name,
        "cache_holds": found.cache_holds,
        "gpu_hours": found.gpu_hours,
        "dollars": dict(found.dollars),
    }


def _pool(name: str, found: Simulated, pool: Pool) -> str:
    return f"{name} {found.node_hours(name):,.0f} node hours at ${pool.dollars:.2f}, ${found.dollars[name]:,.0f}"


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.2f}" if hours < 10 else f"{hours:,.0f}"


def size_text(num_bytes: float) -> str:
    """Bytes for a person."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 1e6:.0f} MB"
