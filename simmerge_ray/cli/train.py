"""`simmerge train`: a selector from signals and labels. `jobs/train_selector.py` is the same command as a job."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.cli.job_line import with_job_line
from simmerge_ray.cli.options import DEFAULT_LOG, LogOption, with_config_options
from simmerge_ray.cli.places import PathOrUri, place_argument, place_option


@with_job_line("train_selector", "out", "crossval")
@with_config_options
def train(
    out: Annotated[PathOrUri, place_option(help="directory of the selector")],
    config: TrainConfig,
    dataset: Annotated[
        PathOrUri | None,
        place_argument(help="directory with signals/ and labels/, or labels.parquet with signals/ beside it"),
    ] = None,
    signals: Annotated[PathOrUri | None, place_option(help="signal table (Parquet), instead of DATASET")] = None,
    labels: Annotated[PathOrUri | None, place_option(help="directory of the label store, instead of DATASET")] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="an arm to choose from, `keep` for both parents as they are; repeatable; default: keep and all "
            "measured on every pair"
        ),
    ] = None,
    crossval: Annotated[
        PathOrUri | None,
        place_option(help="JSON file for results on unseen checkpoints, with --signals and --labels"),
    ] = None,
    log: LogOption = DEFAULT_LOG,
) -> dict[str, Any]:
    """Train a selector from signals and labels; for a DATASET with report.md on what it can do."""
    if dataset is not None and not (signals is labels is crossval is None):
        raise ConfigError("give DATASET alone, without --signals, --labels and --crossval")
    if dataset is None and (signals is None or labels is None):
        raise ConfigError("give DATASET, or both --signals and --labels")
    from simmerge_ray.base.storage import Output, check_outputs

    selector = Output(out, marks=("selector.json",), kind="a selector made by `simmerge train`")
    results = [] if crossval is None else [Output(crossval, "--crossval", is_file=True)]
    check_outputs([selector, *results], {"DATASET": dataset, "--signals": signals, "--labels": labels})
    from simmerge_ray.base.progress import narrated

    with narrated(log) as narrator:
        from simmerge_ray.pipelines.stages import train_dataset_stage, train_stage

        if dataset is not None:
            train_dataset_stage(dataset, out, config, narrator, arm)
        elif signals is not None and labels is not None:
            train_stage(signals, labels, out, config, narrator, arm, crossval)
    return {"out": str(out)}
