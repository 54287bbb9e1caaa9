"""`simmerge ...`: every stage of the chain as a command that reads and writes files.

Commands import what they need when they run, so that `--help` and typos answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from simmerge_ray import __version__
from simmerge_ray.base.errors import ConfigError, InputError, PlanError, SimmergeError, unknown_name
from simmerge_ray.cli.auto import auto
from simmerge_ray.cli.catalogue import catalogue_app
from simmerge_ray.cli.client import client_app
from simmerge_ray.cli.cluster import cluster_app
from simmerge_ray.cli.db import db_app
from simmerge_ray.cli.labels import labels_app
from simmerge_ray.cli.places import PathOrUri, place_argument, place_option
from simmerge_ray.cli.plan import plan
from simmerge_ray.cli.search import search
from simmerge_ray.cli.serve import serve
from simmerge_ray.cli.simulate import simulate_command
from simmerge_ray.pipelines.jobs import stop_on_sigterm

app = typer.Typer(
    name="simmerge",
    help="Predict which merge of checkpoints will work, from similarity signals, and make it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(catalogue_app, name="catalogue")
app.add_typer(labels_app, name="labels")
app.add_typer(client_app, name="client")
app.add_typer(cluster_app, name="cluster")
app.add_typer(db_app, name="db")

CataloguePath = Annotated[PathOrUri, place_argument(help="catalogue YAML: base and checkpoints")]
LogOption = Annotated[Path, typer.Option("--log", help="where the output of libraries goes")]
DEFAULT_LOG = Path("simmerge.log")


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


@app.command()
def demo(
    run: Annotated[Path, typer.Argument(help="directory of the run")] = Path("runs/demo"),
) -> None:
    """Run the whole chain on a small zoo: train, signals, search, selector, pick, merge, report."""
    from simmerge_ray.base.runs import RunLayout

    layout = RunLayout(run)
    from simmerge_ray.base.progress import narrated

    with narrated(layout.log) as narrator:
        from simmerge_ray.pipelines.demo import closing_lines, run_demo

        run_demo(layout, narrator)
        for line in closing_lines(layout):
            narrator.console.print(line, highlight=False, soft_wrap=True, markup=False)


@app.command()
def zoo(run: Annotated[Path, typer.Argument(help="directory of the run; the zoo goes to RUN/zoo")]) -> None:
    """Train the demo's fine-tuned checkpoints, with probes and tasks."""
    from simmerge_ray.base.runs import RunLayout

    layout = RunLayout(run)
    from simmerge_ray.base.progress import narrated

    with narrated(layout.log) as narrator:
        from simmerge_ray.pipelines.demo import zoo_stage

        zoo_stage(layout, narrator)


@app.command()
def signals(
    catalogue: CataloguePath,
    out: Annotated[PathOrUri, place_option(help="Parquet file to write")],
    probes: Annotated[
        PathOrUri | None,
        place_option(
            help="directory of <task>.jsonl with a text per line; default: the general probe set",
        ),
    ] = None,
    signatures: Annotated[
        str | None, typer.Option(help="directory or URI that keeps signatures; default: `signatures` beside OUT")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="weight signals from all weights (exact) or a sample (sampled)")
    ] = "exact",
    positions: Annotated[int, typer.Option(min=1, help="sampled token positions per task")] = 64,
    attention_positions: Annotated[int, typer.Option(min=1, help="those that keep attention rows")] = 16,
    coordinates: Annotated[int, typer.Option(min=1, help="sampled coordinates per tensor")] = 10_000,
    workers: Annotated[int, typer.Option(min=1, help="signal actors")] = 2,
    memory_per_worker: Annotated[
        float | None, typer.Option(help="GB; a checkpoint that needs more is run layer by layer")
    ] = None,
    gpus_per_worker: Annotated[float, typer.Option(help="share of a GPU for each actor; 0 is CPU cores")] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="probes per micro-batch")] = 16,
    max_tokens: Annotated[int, typer.Option(min=3, help="longest probe in tokens; a longer one is an error")] = 256,
    explain: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="LEFT RIGHT", help="then say what the signals of this pair are, in numbers and words"),
    ] = None,
    figures: Annotated[bool, typer.Option(help="heat maps of every signal into OUT's name + _figures")] = True,
    log: LogOption = DEFAULT_LOG,
) -> None:
    """Compute the similarity signals of all pairs of a catalogue; only what is missing is computed."""
    from simmerge_ray.base.config import SignalsConfig, check_config

    values: dict[str, Any] = {
        "num_workers": workers,
        "gpus_per_worker": gpus_per_worker,
        "memory_per_worker": memory_per_worker,
        "weights": weights,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "num_positions": positions,
        "num_attention_positions": attention_positions,
        "num_coordinates": coordinates,
    }
    config = check_config(SignalsConfig, values, "options")
    if explain and explain[0] == explain[1]:
        raise PlanError(f"--explain needs two different checkpoints, got {explain[0]!r} twice")
    from simmerge_ray.checkpoints.catalogue import load_catalogue
    from simmerge_ray.checkpoints.probes import load_probe_sets

    ids = load_catalogue(catalogue).ids
    for name in explain or ():
        if name not in ids:
            raise PlanError(unknown_name("checkpoint", name, ids))
    if probes is not None:
        load_probe_sets(probes)
    from simmerge_ray.base.progress import narrated

    with narrated(log) as narrator:
        from simmerge_ray.pipelines.stages import figures_stage, signals_stage

        table = signals_stage(catalogue, probes, out, config, narrator, signatures)
        if figures:
            figures_stage(table, out, narrator)
        if explain:
            _print_explanation(narrator.console, table, *explain)


def _print_explanation(console: Any, table: Any, left: str, right: str) -> None:
    """The signals of a pair in numbers and words: those of each task's probes, then those of the weights."""
    from itertools import groupby

    from rich.padding import Padding
    from rich.text import Text

    from simmerge_ray.signals.explain import explain

    for task, group in groupby(explain(table, left, right), key=lambda one: one.task):
        about = f"on the probes of {task}" if task else f"weights ({table.provenance['weights']})"
        console.print(Text(f"\n{left} (left) and {right} (right), {about}", "bold underline"))
        for one in group:
            console.print(Text.assemble((one.title, "bold"), "  ", one.numbers))
            if one.sentence:
                console.print(Padding(Text(one.sentence), (0, 0, 0, 4)))


app.command()(search)


@app.command()
def train(
    out: Annotated[PathOrUri, place_option(help="directory of the selector")],
    dataset: Annotated[
        PathOrUri | None,
        place_argument(help="directory with signals/ and labels/, or labels.parquet with signals/ beside it"),
    ] = None,
    signals: Annotated[
        PathOrUri | None,
        place_option(help="signal table (Parquet), instead of DATASET"),
    ] = None,
    labels: Annotated[
        PathOrUri | None,
        place_option(help="directory of the label store, instead of DATASET"),
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="an arm to choose from; default: all measured on every pair")
    ] = None,
    model: Annotated[str, typer.Option(help="mlp, ridge, knn or forest")] = "mlp",
    task_encoding: Annotated[str, typer.Option(help="none, onehot or probe_stats")] = "none",
    crossval: Annotated[
        PathOrUri | None,
        place_option(
            help="JSON file for results on unseen checkpoints, with --signals and --labels",
        ),
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    log: LogOption = DEFAULT_LOG,
) -> None:
    """Train a selector from signals and labels; for a DATASET with report.md on what it can do."""
    from simmerge_ray.base.config import TrainConfig, check_config

    config = check_config(TrainConfig, {"seed": seed, "model": model, "task_encoding": task_encoding}, "options")
    if dataset is not None and not (signals is labels is crossval is None):
        raise ConfigError("give DATASET alone, without --signals, --labels and --crossval")
    if dataset is None and (signals is None or labels is None):
        raise ConfigError("give DATASET, or both --signals and --labels")
    from simmerge_ray.base.progress import narrated

    with narrated(log) as narrator:
        from simmerge_ray.pipelines.stages import train_dataset_stage, train_stage

        if dataset is not None:
            train_dataset_stage(dataset, out, config, narrator, arm)
        elif signals is not None and labels is not None:
            train_stage(signals, labels, out, config, narrator, arm, crossval)


app.command()(plan)
app.command()(auto)


@app.command()
def merge(
    plan_file: Annotated[
        PathOrUri,
        place_argument(metavar="PLAN", help="mergekit YAML, or plan JSON as `simmerge plan --out` writes it"),
    ],
    out: Annotated[PathOrUri, place_argument(help="checkpoint directory to write")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, and every problem")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="refuse a merge that holds NaN or infinity")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="default: as many as cores, at most 4")] = None,
    shard_size: Annotated[float, typer.Option(min=0.001, help="largest weight file, in GB")] = 5.0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="split the work over Ray tasks; OUT and inputs on a shared filesystem")
    ] = None,
) -> None:
    """Make a merge: a Hugging Face checkpoint directory. An interrupted merge goes on where it stopped."""
    from rich.console import Console

    from simmerge_ray.base.progress import Narrator
    from simmerge_ray.merging.request import read_request

    narrator = Narrator(Console())
    request = read_request(plan_file, out)
    if dry_run:
        for line in request.lines(int(shard_size * 1e9), threads):
            narrator.console.print(line, highlight=False, soft_wrap=True, markup=False)
        return
    runner = None
    if workers is not None:
        from simmerge_ray.on_ray.merge_tasks import ray_runner

        runner = ray_runner(workers, threads or 1)
    with narrator.stage("merge") as stage:
        with narrator.byte_bar("bytes written") as report:
            result = request.write(report, int(shard_size * 1e9), threads, strict, runner)
        stage.result = f"{request.graph.title} ({result.num_bytes / 1e9:.3g} GB) -> {result.path}"
    for line in result.lines():
        narrator.console.print(line, highlight=False, soft_wrap=True, markup=False)


@app.command()
def report(run: Annotated[PathOrUri, place_argument(help="directory of the run")]) -> None:
    """Write report.md and its figures from the files of a run."""
    from simmerge_ray.base.runs import RunLayout
    from simmerge_ray.reports.run import write_report

    typer.echo(f"report written to {write_report(RunLayout(run))}")


app.command()(serve)
app.command("simulate")(simulate_command)


def run_command(command: Callable[[], Any]) -> None:
    """Run and exit: code 2 for bad input, 1 for a failure, 130 when interrupted."""
    stop_on_sigterm()
    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except SimmergeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def main() -> None:
    """Entry point of `simmerge`."""
    run_command(app)


if __name__ == "__main__":
    main()
