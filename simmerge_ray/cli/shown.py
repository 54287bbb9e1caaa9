"""What commands that show a table have in common: `--wide`, `--json`, and what goes where.

With `--json` the result alone is on standard output, and everything else that is said on standard error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from simmerge_ray.base.progress import Narrator

WideOption = Annotated[bool, typer.Option("--wide", help="tables with every column, however long their lines are")]
JsonOption = Annotated[bool, typer.Option("--json", help="the result as JSON on stdout; what else is said: on stderr")]


@dataclass(frozen=True)
class Shown:
    """How a command shows what it found. log: of libraries; None where a command loads none that print."""

    log: Path | None = None
    wide: bool = False
    as_json: bool = False

    @contextmanager
    def narrated(self) -> Iterator[Narrator]:
        """A narrator that leaves standard output to JSON where that is asked for."""
        from simmerge_ray.base.progress import narrated

        with narrated(self.log, self.as_json, self.wide) as narrator:
            yield narrator

    def result(self, value: Any) -> None:
        """The result, for programs; outside the narrator, while standard output is whole."""
        if self.as_json:
            typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
