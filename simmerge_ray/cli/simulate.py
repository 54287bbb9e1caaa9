"""`simmerge simulate`: how long a study takes on a cluster, and what it costs, before a node is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from simmerge_ray.base.config import FrozenConfig, option
from simmerge_ray.cli.options import with_config_options


class SimulationConfig(FrozenConfig):
    """A study and the cluster that it runs on."""

    models: int = option(ge=2, description="checkpoints, beside their base")
    params: float = option(ge=1, description="parameters of one, e.g. 7e9")
    nodes: int = option(8, ge=1, description="of each pool")
    signal_machine: str = option("r7i.4xlarge", description="for signals, spot nodes")
    engine_machine: str | None = option(
        None, description="for labels  [default: the cheapest with GPUs that holds one]"
    )
    engine_nodes: int | None = option(None, ge=1, description="[default: --nodes]")
    head_machine: str | None = option(None, description="where the driver runs  [default: m7i.xlarge, n2-standard-4]")
    tasks: int = option(4, ge=1, description="evaluation tasks")
    items: int = option(400, ge=1, description="of a task")
    prompt_tokens: int = option(300, ge=1, description="of an item")
    answer_tokens: int = option(100, ge=0, description="of an item")
    probes: int = option(48, ge=1, description="texts of a probe set")
    probe_tokens: float = option(99, ge=1, description="of a text, padding included")
    arms: tuple[str, ...] = option(
        ("linear", "nuslerp", "scale_matched_linear", "ties(density=0.1)"), flag="arm", description="repeatable"
    )
    ways: int = option(2, ge=2, description="checkpoints of a merge")
    merges: int | None = option(None, ge=0, description="at most  [default: all pairs across tasks, with every arm]")
    cache_gb: float | None = option(None, ge=0, description="of a node, SIMMERGE_CACHE_GB")
    config: Path | None = option(None, description="a config.json, for the model's shape")
    costs: Path | None = option(None, description="unit costs and prices of your own")


@with_config_options
def simulate_command(
    study: SimulationConfig,
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

    costs = load_costs(study.costs)
    model = read_shape(study.params, study.config)
    workload = Workload(
        model,
        study.models,
        study.tasks,
        parse_arms(study.arms),
        study.ways,
        study.merges,
        study.probes,
        study.probe_tokens,
        study.items,
        study.prompt_tokens,
        study.answer_tokens,
    )
    engines = study.engine_machine or cheapest_engine(model, costs.machine(study.signal_machine).cloud, costs)
    simulation = simulate(
        workload,
        make_pool(study.signal_machine, study.nodes, costs, spot=True, cache_gb=study.cache_gb),
        make_pool(engines, study.engine_nodes or study.nodes, costs, cache_gb=study.cache_gb),
        costs,
        study.head_machine,
    )
    if as_json:
        typer.echo(json.dumps(to_json(workload, simulation), indent=1))
        return
    for line in lines(workload, simulation):
        typer.echo(line)
