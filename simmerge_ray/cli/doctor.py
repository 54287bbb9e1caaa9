"""`simmerge doctor`: what is there, what is missing for which command, and what brings it."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def doctor(as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False) -> None:
    """Say what is installed and usable here, and what is missing for which command. Nothing is imported or changed.

    Exit code 1 where nothing would work: another Python, or a library of the core that is absent or of another version.
    """
    from dataclasses import asdict

    from simmerge_ray.capacity.installation import look_around

    findings = look_around()
    is_usable = not any(one.state == "broken" for one in findings)
    if as_json:
        typer.echo(json.dumps({"usable": is_usable, "findings": [asdict(one) for one in findings]}, indent=2))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for one in findings:
            table.add_row(one.state, one.name, f"{one.found}{'; ' if one.says else ''}{one.says}")
        console = Console(markup=False, highlight=False, emoji=False)
        console.print(table)
        missing = sum(one.state == "missing" for one in findings)
        verdict = "usable" if is_usable else "not usable"
        typer.echo(f"{verdict}{f'; {missing} extra(s) missing' if missing else ''}")
    raise typer.Exit(0 if is_usable else 1)
