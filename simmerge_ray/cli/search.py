"""`simmerge search`: the best merge that can be found within a budget. `simmerge labels make` labels pairs x arms."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from simmerge_ray.base.config import BestMergeConfig, SearchConfig
from simmerge_ray.base.errors import ConfigError, TaskError
from simmerge_ray.base.storage import Output, check_outputs
from simmerge_ray.cli.options import DEFAULT_LOG, LogOption, with_config_options
from simmerge_ray.cli.places import CatalogueArgument, PathOrUri, place_option
from simmerge_ray.cli.shown import JsonOption, Shown, WideOption

StoreOption = Annotated[PathOrUri, place_option(help="directory of the label store")]
TasksOption = Annotated[
    PathOrUri | None, place_option(help="directory of <task>.jsonl with prompt and target per line")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="check everything, say what it takes, and stop")]


@with_config_options
def search(
    catalogue: CatalogueArgument,
    out: StoreOption,
    config: BestMergeConfig,
    tasks: TasksOption = None,
    dry_run: DryRunOption = False,
    wide: WideOption = False,
    as_json: JsonOption = False,
    log: LogOption = DEFAULT_LOG,
) -> None:
    """Search for the best merge: propose merges, evaluate them, stop bad ones early. Existing labels are kept.

    An interrupted search goes on with the same command.
    """
    if config.budget is None:
        raise ConfigError("name --budget N, the merges to try; `simmerge labels make` labels every pair and arm")
    shown = Shown(log, wide, as_json)
    run_search_command(catalogue, tasks, out, SearchConfig(**config.model_dump()), dry_run, shown)


def run_search_command(
    catalogue: PathOrUri,
    tasks: PathOrUri | None,
    out: PathOrUri,
    config: SearchConfig,
    dry_run: bool,
    shown: Shown,
    probes: PathOrUri | None = None,
) -> None:
    """Check names and files before any library is loaded, then search, or with `dry_run` say what that would take.

    probes: for answers that merges are asked for beside the tasks.
    """
    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.plans.operators.specs import parse_arms
    from simmerge_ray.search.evaluation import load_tasks
    from simmerge_ray.search.objectives import parse_objective
    from simmerge_ray.search.space import make_space

    parse_arms(config.arms)
    check_outputs([Output(out)], {"CATALOGUE": catalogue, "--tasks": tasks, "--probes": probes})
    checkpoints = load_catalogue(catalogue)
    files = load_tasks(tasks) if tasks is not None else {}
    if not files and not config.lm_eval:
        raise TaskError("no tasks: name a directory with --tasks, or tasks of lm-evaluation-harness with --lm-eval")
    if config.budget is not None:
        make_space(checkpoints, config)
        for text in () if config.lm_eval else config.objectives:  # a group of lm-eval is several tasks: checked later
            parse_objective(text, files)
    with shown.narrated() as narrator:
        from simmerge_ray.pipelines.dataset import plan_search, search_stage

        result: dict[str, Any]
        if dry_run:
            estimate = plan_search(catalogue, tasks, out, config)
            narrator.print_lines(estimate.lines())
            result = asdict(estimate)
        else:
            result = search_stage(catalogue, tasks, out, config, narrator, probes)
    shown.result(result)
