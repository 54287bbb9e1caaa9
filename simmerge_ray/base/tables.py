"""Tables for a terminal or a log of any width: no name is ever cut or broken.

What does not fit is shown with fewer columns, and if that does not help, a row a block of lines. There are no box
characters: a table in a log file is the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_GAP = "  "
_INDENT = "    "


@dataclass(frozen=True)
class Column:
    """right: of numbers. optional: left out where the lines are too short for all; the last such column goes first."""

    name: str
    right: bool = False
    optional: bool = False


def columns_of(left: Sequence[str] = (), right: Sequence[str] = (), optional: Sequence[str] = ()) -> list[Column]:
    """Columns of text, then those of numbers; some of both are optional."""
    every = [*((name, False) for name in left), *((name, True) for name in right)]
    return [Column(name, is_right, name in optional) for name, is_right in every]


@dataclass(frozen=True)
class TextTable:
    """rows: a text for each column. A row whose first cell is `*` is printed in bold."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]

    def print(self, console: Console, wide: bool = False) -> None:
        """As wide as the console at most; wide: every column, however long the lines are."""
        lines = list(self._lines(10**9 if wide else console.width))
        for style, text in [("italic", self.title), *lines] if self.title else lines:
            console.print(text, style=style or None, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def _lines(self, width: int) -> Iterator[tuple[str, str]]:
        """Style and text of each line."""
        left_out: list[str] = []
        # A column that says nothing about any row is no loss.
        shown = [place for place in range(len(self.columns)) if not self.rows or any(row[place] for row in self.rows)]
        while self._width(shown) > width and (spare := [place for place in shown if self.columns[place].optional]):
            shown.remove(spare[-1])
            left_out.insert(0, self.columns[spare[-1]].name)
        if self._width(shown) > width:
            yield from self._blocks(width)
            return
        yield "bold", self._line([column.name for column in self.columns], shown)
        for row in self.rows:
            yield _style(row), self._line(row, shown)
        if left_out:
            yield "dim", f"(not shown for lack of room: {', '.join(left_out)}; --wide shows all)"

    def _blocks(self, width: int) -> Iterator[tuple[str, str]]:
        """Each row as its first texts on a line of their own, and the rest below it, by name."""
        head = 1 + next((place for place, column in enumerate(self.columns) if column.name and not column.right), 0)
        for row in self.rows:
            yield "bold", _GAP.join(filter(None, row[:head]))
            line = ""
            for column, cell in zip(self.columns[head:], row[head:], strict=True):
                told = f"{column.name} {cell}"
                if cell and line and _width(f"{_INDENT}{line}; {told}") > width:
                    yield "", f"{_INDENT}{line};"
                    line = told
                elif cell:
                    line = f"{line}; {told}" if line else told
            if line:
                yield "", _INDENT + line

    def _line(self, cells: Sequence[str], shown: Sequence[int]) -> str:
        padded = []
        for place in shown:
            room = " " * (self._column_width(place) - _width(cells[place]))
            padded.append(room + cells[place] if self.columns[place].right else cells[place] + room)
        return _GAP.join(padded).rstrip()

    def _column_width(self, place: int) -> int:
        return max(_width(text) for text in (self.columns[place].name, *(row[place] for row in self.rows)))

    def _width(self, shown: Sequence[int]) -> int:
        return sum(map(self._column_width, shown)) + len(_GAP) * (len(shown) - 1)


def _style(row: Sequence[str]) -> str:
    return "bold" if row and row[0] == "*" else ""


def _width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    from rich.cells import cell_len

    return cell_len(text)
