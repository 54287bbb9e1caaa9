"""Tables and numbers of the Markdown that this package writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_NONE = "-"  # for a value that could not be computed


def table_lines(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A table, with an empty line after it; floats get three digits, None a dash."""
    shown = [[number(cell) if cell is None or isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return [*("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *shown)), ""]


def number(value: float | None, signed: bool = False, digits: int = 3) -> str:
    """A value; signed: with + or -."""
    return _NONE if value is None else f"{value:{'+' if signed else ''}.{digits}f}"


def percent(share: float | None) -> str:
    """A share of 1."""
    return _NONE if share is None else f"{100 * share:.0f} %"


def with_interval(value: float | None, interval: Sequence[float] | None, signed: bool = False, digits: int = 3) -> str:
    """A value and its interval."""
    if value is None:
        return _NONE
    bounds = "no interval" if interval is None else ", ".join(number(bound, signed, digits) for bound in interval)
    return f"{number(value, signed, digits)} [{bounds}]"
