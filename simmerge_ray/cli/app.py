"""`simmerge ...`: every stage of the chain as a command that reads and writes files.

Commands import what they need when they run, so that `--help` and typos answer at once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from simmerge_ray.base.errors import ConfigError, InputError, SimmergeError
from simmerge_ray.base.version import __version__
from simmerge_ray.cli.auto import auto
from simmerge_ray.cli.catalogue import catalogue_app
from simmerge_ray.cli.client import client_app
from simmerge_ray.cli.cluster import cluster_app
from simmerge_ray.cli.db import db_app
from simmerge_ray.cli.demo import demo, report, zoo
from simmerge_ray.cli.doctor import doctor
from simmerge_ray.cli.extract_lora import extract_lora_command
from simmerge_ray.cli.helps import WELCOME, add_helps
from simmerge_ray.cli.init import init
from simmerge_ray.cli.labels import labels_app
from simmerge_ray.cli.merge import merge
from simmerge_ray.cli.plan import plan
from simmerge_ray.cli.predictor import predictor_app
from simmerge_ray.cli.push import push
from simmerge_ray.cli.retention import retention
from simmerge_ray.cli.search import search
from simmerge_ray.cli.serve import serve
from simmerge_ray.cli.signals import signals
from simmerge_ray.cli.simulate import simulate_command
from simmerge_ray.cli.train import train
from simmerge_ray.cli.tune import tune
from simmerge_ray.pipelines.jobs import run_job, stop_on_sigterm

_MAX_SAID = 20_000  # characters of an error, which may hold what a file says
_SETTINGS: dict[str, Any] = {"pretty_exceptions_enable": False}

app = typer.Typer(
    name="simmerge",
    help="Find the merge that keeps most of what its members can, and make it.",
    **_SETTINGS,
)
for command in (
    init,
    demo,
    zoo,
    signals,
    search,
    train,
    plan,
    auto,
    tune,
    merge,
    retention,
    push,
    report,
    serve,
    doctor,
):
    app.command()(command)
app.command("extract-lora")(extract_lora_command)
app.command("simulate")(simulate_command)
app.add_typer(catalogue_app, name="catalogue")
app.add_typer(labels_app, name="labels")
app.add_typer(predictor_app, name="predictor")
app.add_typer(client_app, name="client")
app.add_typer(cluster_app, name="cluster")
app.add_typer(db_app, name="db")
add_helps(app)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(WELCOME.format(version=__version__))


def run_command(command: Callable[[], Any]) -> None:
    """Run and exit: code 2 for bad input, 1 for a failure, 130 when interrupted; each with one message."""
    stop_on_sigterm()
    try:
        command()
    except SimmergeError as error:
        text = str(error)
        more = f"... and {len(text) - _MAX_SAID} more characters" if len(text) > _MAX_SAID else ""
        print(f"error: {text[:_MAX_SAID]}{more}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(130)
    except SystemExit as end:
        ended = end.__context__
        if end.code == 130 and ended is not None and isinstance(ended.__cause__, KeyboardInterrupt):
            _say_interrupted()  # typer has made an exit of Ctrl-C, in silence
        raise


def _say_interrupted() -> None:
    print("interrupted; nothing is half-written, and the same command goes on from what is kept", file=sys.stderr)


def run_as_job(command: Callable[..., Any], usage: str, *defaults: str) -> None:
    """Run a command that has `--job-line` as the script in `jobs/` that is called, and exit. usage: its docstring, for
    `--help`. defaults: options of the job where the command has others."""
    job = typer.Typer(add_completion=False, **_SETTINGS)
    text = re.sub(r"(?<=\S)\n(?=\S)", " ", usage).replace("\n\n    ", "\n\n\b\n    ")  # keeps what is indented
    job.command(help=text)(command)
    try:
        code = job([*defaults, "--job-line", *sys.argv[1:]], standalone_mode=False)
    except TyperException as error:
        message = error.format_message()

        def refuse() -> NoReturn:
            raise ConfigError(message)

        code = run_job(Path(sys.argv[0]).stem, refuse)
    sys.exit(code)


def main() -> None:
    """Entry point of `simmerge`."""
    run_command(app)


if __name__ == "__main__":
    main()
