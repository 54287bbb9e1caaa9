"""`simmerge tune`: coefficients of a merge by gradient on unlabeled probes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simmerge_ray.base.config import TuneConfig
from simmerge_ray.base.storage import Output, check_outputs
from simmerge_ray.cli.options import DEFAULT_LOG, LogOption, with_config_options
from simmerge_ray.cli.places import CatalogueArgument, PathOrUri, path_option, place_option


@with_config_options
def tune(
    catalogue: CatalogueArgument,
    probes: Annotated[PathOrUri, place_option(help="directory of <task>.jsonl, a `text` a line: prompts only")],
    out: Annotated[Path, path_option(help="directory for the state and recipe.json")],
    config: TuneConfig,
    member: Annotated[list[str] | None, typer.Option(help="checkpoint to merge; repeatable; default: all")] = None,
    log: LogOption = DEFAULT_LOG,
) -> None:
    """Find a weight for every member and layer, so that the merge answers the probes as its members do; no labels.

    An interrupted run goes on with the same command. `--method regmean` merges linear layers in closed form instead.
    """
    check_outputs([Output(out)], {"CATALOGUE": catalogue, "--probes": probes})
    from simmerge_ray.pipelines.tune import regmean_stage, tune_stage, tuning_sources

    is_closed = config.method == "regmean"
    loaded, probe_sets = tuning_sources(catalogue, member or (), probes, needs_base=not is_closed)
    from simmerge_ray.base.progress import narrated

    with narrated(log) as narrator:
        path = (regmean_stage if is_closed else tune_stage)(loaded, probe_sets, config, out, narrator)
        narrator.print_lines([f"recipe written to {path}; make it with: simmerge merge {path} OUT"])
