"""`simmerge simulate`: how long a study or a choice takes on a cluster, and what it costs, before a node is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simmerge_ray.base.config import FrozenConfig, option
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.finding import shortlist_of
from simmerge_ray.cli.options import changed_options, with_config_options

if TYPE_CHECKING:
    from simmerge_ray.capacity.simulation import Pool, UnitCosts, Workload


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


_AUTO = "A choice by `simmerge auto`"


class ChoiceConfig(FrozenConfig):
    """A choice without labels, instead of a study."""

    auto: bool = option(False, "simulate a choice without labels beside measured merges, all on the engines' machine",
                        panel=_AUTO)  # fmt: skip
    max_tokens: int = option(16, "longest answer to a probe", ge=1, le=256, panel=_AUTO)
    recipes: int = option(10_000, "merges scored from signatures", ge=100, panel=_AUTO)
    shortlist: int | None = option(
        None, "of them run over the probes; default: 4 for each member, 8 to 24", ge=2, panel=_AUTO
    )
    tuned: int = option(1, "merges that are tuned", ge=1, le=8, panel=_AUTO)
    steps: int = option(12, "of tuning, as an early stop leaves them; 0 for none", ge=0, panel=_AUTO)
    adapters: bool = option(False, "members are LoRA adapters of the base, which tuning keeps small", panel=_AUTO)
    evaluate: tuple[int, ...] = option((1, 8, 20, 40), "measured merges to compare with; repeatable", panel=_AUTO)


@with_config_options
def simulate_command(
    study: SimulationConfig,
    choice: ChoiceConfig,
    as_json: Annotated[bool, typer.Option("--json", help="bytes, seconds and dollars")] = False,
) -> None:
    """Simulate a study: signals of all pairs, then labels. Prints the plan, the bottleneck and the cost. With --auto, a
    choice without labels.

    The units of work, the stages, the queue and the placement are the real ones; what a unit takes are the figures of
    benchmarks/README.md, and vendors' figures for GPUs, networks and prices.
    """
    from simmerge_ray.capacity.simulation import Workload, load_costs, make_pool, simulate
    from simmerge_ray.capacity.simulation.page import lines, to_json
    from simmerge_ray.capacity.simulation.shapes import cheapest_engine, read_shape
    from simmerge_ray.plans.operators.specs import parse_arms

    if not choice.auto and (given := changed_options(choice)):
        raise ConfigError(f"{given[0]} is about a choice without labels: give --auto, too")
    if any(count < 0 for count in choice.evaluate):
        raise ConfigError(f"--evaluate {min(choice.evaluate)}: numbers of measured merges are 0 or more")
    costs = load_costs(study.costs)
    model = read_shape(study.params, study.config)
    named = {"tasks", "ways", "probes", "probe_tokens", "items", "prompt_tokens", "answer_tokens"}
    sizes = study.model_dump(include=named) | {"num_models": study.models, "max_merges": study.merges}
    workload = Workload(model, arms=parse_arms(study.arms), **sizes)
    engines = study.engine_machine or cheapest_engine(model, costs.machine(study.signal_machine).cloud, costs)
    if choice.auto:
        pool = make_pool(engines, study.engine_nodes or study.nodes, costs)
        typer.echo(_choice_text(workload, choice, pool, costs, study.head_machine, as_json))
        return
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


def _choice_text(
    workload: Workload, choice: ChoiceConfig, pool: Pool, costs: UnitCosts, head: str | None, as_json: bool
) -> str:
    from simmerge_ray.capacity.simulation.choice import ChoiceWork, simulate_choice
    from simmerge_ray.capacity.simulation.choice_page import choice_json, choice_lines

    named = {"recipes", "tuned", "steps", "adapters"}
    shortlist = choice.shortlist or shortlist_of(workload.num_models)
    work = ChoiceWork(choice.max_tokens, shortlist=shortlist, **choice.model_dump(include=named))
    found = simulate_choice(workload, work, pool, costs, head, choice.evaluate)
    if as_json:
        return json.dumps(choice_json(workload, work, found), indent=1)
    return "\n".join(choice_lines(workload, work, found))
