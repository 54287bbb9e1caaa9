"""`simmerge simulate`: how long a study takes on a cluster, and what it costs, before a node is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

_ARMS = ("linear", "nuslerp", "scale_matched_linear", "ties(density=0.1)")


def simulate_command(
    models: Annotated[int, typer.Option("--models", min=2, help="checkpoints, beside their base")],
    params: Annotated[float, typer.Option("--params", min=1, help="parameters of one, e.g. 7e9")],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="of each pool")] = 8,
    signal_machine: Annotated[str, typer.Option("--signal-machine", help="for signals, spot nodes")] = "r7i.4xlarge",
    engine_machine: Annotated[
        str | None,
        typer.Option("--engine-machine", help="for labels  [default: the cheapest with GPUs that holds one]"),
    ] = None,
    engine_nodes: Annotated[int | None, typer.Option("--engine-nodes", min=1, help="[default: --nodes]")] = None,
    head_machine: Annotated[
        str | None, typer.Option("--head-machine", help="where the driver runs  [default: m7i.xlarge, n2-standard-4]")
    ] = None,
    tasks: Annotated[int, typer.Option("--tasks", min=1)] = 4,
    items: Annotated[int, typer.Option("--items", min=1, help="of a task")] = 400,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="of an item")] = 300,
    answer_tokens: Annotated[int, typer.Option("--answer-tokens", min=0, help="of an item")] = 100,
    probes: Annotated[int, typer.Option("--probes", min=1, help="texts of a probe set")] = 48,
    probe_tokens: Annotated[float, typer.Option("--probe-tokens", min=1, help="of a text, padding included")] = 99,
    arm: Annotated[list[str] | None, typer.Option("--arm", help=f"[default: {', '.join(_ARMS)}]")] = None,
    ways: Annotated[int, typer.Option("--ways", min=2, help="checkpoints of a merge")] = 2,
    merges: Annotated[
        int | None, typer.Option("--merges", min=0, help="at most  [default: all pairs across tasks, with every arm]")
    ] = None,
    cache_gb: Annotated[float | None, typer.Option("--cache-gb", min=0, help="of a node, SIMMERGE_CACHE_GB")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="a config.json, for the model's shape")] = None,
    costs: Annotated[Path | None, typer.Option("--costs", help="unit costs and prices of your own")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="bytes, seconds and dollars")] = False,
) -> None:
    """Simulate a study: signals of all pairs, then labels. Prints the plan, the bottleneck and the cost.

    The units of work, the stages, the queue and the placement are the real ones; what a unit takes are the figures of
    benchmarks/README.md, and vendors' figures for GPUs, networks and prices.
    """
    from simmerge_ray.capacity.simulation import Workload, load_costs, make_pool, simulate
    from simmerge_ray.capacity.simulation.page import lines, to_json
    from simmerge_ray.capacity.simulation.shapes import cheapest_engine, read_shape
    from simmerge_ray.plans.operators.specs import parse_arms

    figures = load_costs(costs)
    model = read_shape(params, config)
    workload = Workload(
        model,
        models,
        tasks,
        parse_arms(arm or _ARMS),
        ways,
        merges,
        probes,
        probe_tokens,
        items,
        prompt_tokens,
        answer_tokens,
    )
    engines = engine_machine or cheapest_engine(model, figures.machine(signal_machine).cloud, figures)
    found = simulate(
        workload,
        make_pool(signal_machine, nodes, figures, spot=True, cache_gb=cache_gb),
        make_pool(engines, engine_nodes or nodes, figures, cache_gb=cache_gb),
        figures,
        head_machine,
    )
    if as_json:
        typer.echo(json.dumps(to_json(workload, found), indent=1))
        return
    for line in lines(workload, found):
        typer.echo(line)
