"""Tables at any width: no name is cut or broken, columns that have no room are named, and nothing draws boxes."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from simmerge_ray.base.tables import Column, TextTable, columns_of

NAMES = ["ties(density=0.1): math-strong + code-strong + rag-strong", "keep(math-strong)", "linear: a + b"]
TABLE = TextTable(
    "utility",
    [
        *columns_of(["", "merge"], ["measured", "math-strong on math", "rag-strong on rag"]),
        Column("why", optional=True),
    ],
    [["*", name, "0.700", "0.512", "0.644", "weights +0.100, outputs -0.050"] for name in NAMES],
)


def printed(table: TextTable, width: int, wide: bool = False, terminal: bool = False) -> str:
    table.print(Console(file=(out := io.StringIO()), width=width, force_terminal=terminal), wide)
    return out.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200, 400])
def test_no_name_is_cut_or_broken_at_any_width(width):
    text = printed(TABLE, width)
    for name in (*NAMES, "0.512", "math-strong on math"):
        assert name in text
    assert not {*"│┃━─┏┓┡…"} & {*text}
    longest = max(len(name) for name in NAMES) + 3
    assert max(map(len, text.splitlines())) <= max(width, longest, 75)  # 75: the note on what is not shown


def test_columns_go_before_rows_become_blocks_and_wide_shows_all():
    assert "why" in printed(TABLE, 200).splitlines()[1]
    note = "(not shown for lack of room: why; --wide shows all)"
    assert printed(TABLE, 120).splitlines()[-1] == note
    blocks = printed(TABLE, 60).splitlines()
    assert blocks[1] == f"*  {NAMES[0]}" and blocks[2].startswith("    measured 0.700; math-strong on math 0.512")
    assert "why" in printed(TABLE, 60, wide=True) and len(printed(TABLE, 60, wide=True).splitlines()) == 2 + len(NAMES)


def test_a_column_without_any_value_is_left_out():
    table = TextTable("", columns_of(["name"], ["a", "b"]), [["x", "1", ""], ["y", "2", ""]])
    assert printed(table, 80).splitlines() == ["name  a", "x     1", "y     2"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.text("abé漢 [x]*", max_size=30)] * 3), min_size=1, max_size=4), st.integers(10, 90))
def test_every_cell_is_whole_whatever_it_holds(rows, width):
    table = TextTable("", columns_of(["name", "what"], ["n"]), [list(row) for row in rows])
    text = printed(table, width)
    assert all(cell.strip() in text for row in rows for cell in row)
