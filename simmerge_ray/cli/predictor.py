"""`simmerge predictor train`: what a candidate is worth, from what it keeps of its members' answers."""

from __future__ import annotations

from typing import Annotated

import typer

from simmerge_ray.base.config import PredictorConfig
from simmerge_ray.base.storage import Output, as_place, check_outputs
from simmerge_ray.cli.options import DEFAULT_LOG, LogOption, with_config_options
from simmerge_ray.cli.places import PathOrUri, place_option

predictor_app = typer.Typer(help="The utility of a merge from what it keeps.", no_args_is_help=True)


@predictor_app.command("train")
@with_config_options
def train_predictor_command(
    labels: Annotated[
        list[str],
        typer.Argument(metavar="LABELS...", help="label stores made with `labels make --probes`, one for each base"),
    ],
    out: Annotated[PathOrUri, place_option(help="directory of the predictor")],
    config: PredictorConfig,
    log: LogOption = DEFAULT_LOG,
) -> None:
    """Train a predictor of utilities; the operator of a merge is no input.

    Labels for it are made with `simmerge labels make CATALOGUE --tasks TASKS --probes PROBES --out LABELS`.
    """
    stores = [as_place(one) for one in labels]
    predictor = Output(out, marks=("predictor.json",), kind="a predictor made by `simmerge predictor train`")
    check_outputs([predictor], {f"LABELS {one}": one for one in stores})
    from simmerge_ray.base.progress import narrated

    with narrated(log) as narrator:
        from simmerge_ray.pipelines.predictor import predictor_stage

        predictor_stage(stores, out, config, narrator)
