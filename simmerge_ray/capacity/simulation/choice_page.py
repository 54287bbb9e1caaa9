"""A simulated choice without labels for people, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simmerge_ray.capacity.simulation.choice import ChoiceWork, Holders, SimulatedChoice
from simmerge_ray.capacity.simulation.page import SOURCES, engine_text, model_line, phase_json, size_text
from simmerge_ray.capacity.simulation.workers import Phase
from simmerge_ray.capacity.simulation.workload import Workload


def choice_lines(workload: Workload, work: ChoiceWork, found: SimulatedChoice) -> list[str]:
    """For a person."""
    longest = max(found.phases, key=lambda phase: phase.seconds)
    share = longest.seconds / found.seconds(found.phases)
    return [
        *_asked_lines(workload, work, found),
        "",
        *_part_lines(found),
        "",
        *_table_lines(workload, found),
        "",
        f"bottleneck  {longest.name}, {share:.0%} of the time; {longest.cause}",
        *_warnings(work, found),
        SOURCES,
    ]


def _asked_lines(workload: Workload, work: ChoiceWork, found: SimulatedChoice) -> list[str]:
    nodes = f"{found.pool.nodes} x {found.pool.machine}"
    return [
        model_line(workload.model),
        f"choice    {workload.num_models} members and their base; {workload.probes} probes of "
        f"{workload.probe_tokens:g} tokens for each, answers of {work.answer_tokens}; {work.recipes:,} recipes, "
        f"{work.shortlist} run over probes",
        f"workers   {nodes}, {found.holders.per_node} a node, {_device(found.holders)}, a model whole in float32: "
        f"{size_text(found.holders.held_bytes)}",
        f"engines   {nodes}, {found.engines.per_node} a node, {engine_text(found.engines)}; an engine "
        f"{size_text(found.engines.engine_bytes)}",
        f"tuning    {_tuning_text(work, found)}",
        f"driver    {found.head.machine}: it ranks recipes and writes the merge",
    ]


def _tuning_text(work: ChoiceWork, found: SimulatedChoice) -> str:
    if not (work.steps and work.tuned):
        return "none"
    asked = f"{work.tuned} merge{'s' if work.tuned > 1 else ''}, {work.steps} steps, {size_text(found.tuning_bytes)}"
    return f"{asked}, {_device(found.tuner)}" if found.tuner else f"{asked}: no node has the memory, left out"


def _device(holders: Holders) -> str:
    return "a core each" if holders.gpu is None else "a GPU each"


def _part_lines(found: SimulatedChoice) -> list[str]:
    network = sum(phase.network_bytes for phase in found.phases)
    return [
        f"{'part':<25}{'where':<9}{'workers':>8}{'units':>9}{'seconds':>11}{'network':>10}  most of it",
        *(
            f"{phase.name:<25}{phase.place:<9}{phase.workers:>8}{phase.units:>9,}{phase.seconds:>11,.0f}"
            f"{size_text(phase.network_bytes):>10}  {phase.cause}, {phase.share:.0%}"
            for phase in found.phases
        ),
        f"{'together':<25}{'':<9}{'':>8}{'':>9}{found.seconds(found.phases):>11,.0f}{size_text(network):>10}",
    ]


def _table_lines(workload: Workload, found: SimulatedChoice) -> list[str]:
    """The choice, and measured merges of the same members: each with digests and the merge that is written."""
    untuned = [phase for phase in found.phases if not phase.name.startswith("tun")]
    rows: list[tuple[str, Sequence[Phase]]] = [("without labels", found.phases)]
    if len(untuned) < len(found.phases):
        rows.append(("without labels, not tuned", untuned))
    rows += [(f"{count} merge{'s' if count > 1 else ''} measured", phases) for count, phases in found.measured.items()]
    tasks = min(workload.tasks, workload.num_models)
    return [
        f"{'choice':<27}{'seconds':>11}{'node hours':>12}{'dollars':>10}",
        *(
            f"{name:<27}{found.seconds(phases):>11,.0f}{found.node_hours(phases):>12,.2f}"
            f"{found.dollars(phases):>10,.2f}"
            for name, phases in rows
        ),
        f"Measured: on {workload.items} labeled items of {tasks} tasks, beside all checkpoints as they are.",
    ]


def _warnings(work: ChoiceWork, found: SimulatedChoice) -> list[str]:
    told = []
    if found.pool.gpu_gb and found.holders.gpu is None:
        told.append(
            f"warning     no GPU holds a model whole in float32: answers and passes run on {found.holders.per_node} "
            "cores of a node, without --gpus-per-trial"
        )
    if found.tuner and found.pool.gpu_gb and found.tuner.gpu is None:
        told.append(
            "warning     no GPU holds the tuning: it runs on one core; `--tune none`, or larger GPUs, or members that "
            "are adapters (--adapters)"
        )
    return told


def choice_json(workload: Workload, work: ChoiceWork, found: SimulatedChoice) -> dict[str, Any]:
    """All of it, in bytes, seconds and dollars."""

    def row(phases: Sequence[Phase]) -> dict[str, Any]:
        return {
            "phases": [phase_json(phase) for phase in phases],
            "seconds": found.seconds(phases),
            "node_hours": found.node_hours(phases),
            "dollars": found.dollars(phases),
        }

    return {
        "model": workload.model.model_dump(),
        "members": workload.num_models,
        "work": vars(work),
        "machine": found.pool.machine,
        "nodes": found.pool.nodes,
        "worker": {"bytes": found.holders.held_bytes, "per_node": found.holders.per_node,
                   "gpu": found.holders.gpu is not None},
        "tuning": {"bytes": found.tuning_bytes, "fits": found.tuner is not None,
                   "gpu": found.tuner is not None and found.tuner.gpu is not None},
        "without_labels": row(found.phases),
        "measured": {str(count): row(phases) for count, phases in found.measured.items()},
    }  # fmt: skip
