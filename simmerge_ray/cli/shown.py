"""What commands that show a table have in common: `--wide`, `--json`, and where each goes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

WideOption = Annotated[bool, typer.Option("--wide", help="tables with every column, however long their lines are")]
JsonOption = Annotated[bool, typer.Option("--json", help="the result as JSON on stdout; what else is said: on stderr")]


def plain_console(as_json: bool = False) -> Console:
    """For text that may hold anything; on stderr where stdout is for JSON."""
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False, stderr=as_json)


def echo_json(value: Any) -> None:
    """A result on stdout."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
