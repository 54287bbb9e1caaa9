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

    models: int = option(..., "checkpoints, beside their base", ge=2)
    params: float = option(..., "parameters of one, e.g. 7e9", ge=1)
    nodes: int = option(8, "of each pool", ge=1)
    signal_machine: str = option("r7i.4xlarge", "for signals, spot nodes")
    engine_machine: str | None = option(None, "for labels  [default: the cheapest with GPUs that holds one]")
    engine_nodes: int | None = option(None, "[default: --nodes]", ge=1)
    head_machine: str | None = option(None, "where the driver runs  [default: m7i.xlarge, n2-standard-4]")
    tasks: int = option(4, "evaluation tasks", ge=1)
    items: int = option(400, "of a task", ge=1)
    prompt_tokens: int = option(300, "of an item", ge=1)
    answer_tokens: int = option(100, "of an item", ge=0)
    probes: int = option(48, "texts of a probe set", ge=1)
    probe_tokens: float = option(99, "of a text, padding included", ge=1)
    arms: tuple[str, ...] = option(
        ("linear", "nuslerp", "scale_matched_linear", "ties(density=0.1)"), "repeatable", flag="arm"
    )
    ways: int = option(2, "checkpoints of a merge", ge=2)
    merges: int | None = option(None, "at most  [default: all pairs across tasks, with every arm]", ge=0)
    cache_gb: float | None = option(None, "of a node, SIMMERGE_CACHE_GB", ge=0)
    config: Path | None = option(None, "a config.json, for the model's shape")
    costs: Path | None = option(None, "unit costs and prices of your own")


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
    named = {"tasks", "ways", "probes", "probe_tokens", "items", "prompt_tokens", "answer_tokens"}
    sizes = study.model_dump(include=named) | {"num_models": study.models, "max_merges": study.merges}
    workload = Workload(model, arms=parse_arms(study.arms), **sizes)
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
