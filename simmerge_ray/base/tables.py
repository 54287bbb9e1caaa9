"""Tables for a terminal or a log of any width: no name is ever cut or broken.

What does not fit is shown with fewer columns, and if that does not help, a row a block of lines. There are no box
characters: a table in a log file is the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

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
        console.print(Text(self.title, "italic"), soft_wrap=True)
        for text in self._lines(10**9 if wide else console.width):
            console.print(text, soft_wrap=True, highlight=False)

    def _lines(self, width: int) -> Iterator[Text]:
        left_out: list[str] = []
        # A column that says nothing about any row is no loss.
        shown = [place for place in range(len(self.columns)) if not self.rows or any(row[place] for row in self.rows)]
        while self._width(shown) > width and (spare := [place for place in shown if self.columns[place].optional]):
            shown.remove(spare[-1])
            left_out.insert(0, self.columns[spare[-1]].name)
        if self._width(shown) > width:
            yield from self._blocks(width)
            return
        widths = [self._column_width(place) for place in shown]
        yield _line([self.columns[place].name for place in shown], widths, self._right(shown), "bold")
        for row in self.rows:
            style = "bold" if row and row[0] == "*" else ""
            yield _line([row[place] for place in shown], widths, self._right(shown), style)
        if left_out:
            yield Text(f"(not shown for lack of room: {', '.join(left_out)}; --wide shows all)", "dim")

    def _blocks(self, width: int) -> Iterator[Text]:
        """Each row as its first texts on a line of their own, and the rest below it, by name."""
        head = next((place for place, column in enumerate(self.columns) if column.name and not column.right), 0)
        for row in self.rows:
            yield Text(_GAP.join(filter(None, row[: head + 1])), "bold")
            line = ""
            for column, cell in zip(self.columns[head + 1 :], row[head + 1 :], strict=True):
                told = f"{column.name} {cell}"
                if not cell:
                    continue
                if line and cell_len(_INDENT + line + "; " + told) > width:
                    yield Text(f"{_INDENT}{line};")
                    line = ""
                line = f"{line}; {told}" if line else told
            if line:
                yield Text(_INDENT + line)

    def _column_width(self, place: int) -> int:
        return max(cell_len(text) for text in (self.columns[place].name, *(row[place] for row in self.rows)))

    def _width(self, shown: Sequence[int]) -> int:
        return sum(map(self._column_width, shown)) + len(_GAP) * (len(shown) - 1)

    def _right(self, shown: Sequence[int]) -> list[bool]:
        return [self.columns[place].right for place in shown]


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool], style: str) -> Text:
    padded = []
    for cell, width, is_right in zip(cells, widths, right, strict=True):
        room = " " * (width - cell_len(cell))
        padded.append(room + cell if is_right else cell + room)
    return Text(_GAP.join(padded).rstrip(), style)
