"""A report as two files of one content: `report.md`, and `report.html`, which holds its figures and asks no host for
anything. Both are made from the same blocks of Markdown: headings, paragraphs, lists, tables; empty ones are left out.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from simmerge_ray.base.markdown import table_lines
from simmerge_ray.base.storage import Place, write_atomically
from simmerge_ray.reports.frame import FRAME

# What a reader may not know; a report explains those of them that it uses.
_WORDS: Mapping[str, str] = {
    "arm": "a merge operator with its parameters, or keeping a parent as it is: what is chosen from for a pair",
    "context": "a pair of checkpoints on one task",
    "GapClosed": "(utility of the merge - that of the weaker parent) / (that of the better parent - that of the weaker "
    "one) on a task: 0 is as good as the weaker parent, 1 as the better one, more than 1 is better than both; which "
    "parent is the better one is decided on one half of the items, all utilities come from the other half",
    "headroom": "how much an oracle, which knows the best arm of every pair, gains over the best fixed arm: what a "
    "choice could win at most",
    "split-half oracle": "the best on one half of the items, scored on the other, so that luck is not counted",
    "best fixed arm": "the one arm that is best when it is taken for all pairs",
    "utility": "quality of a model on a task from 0 to 1, higher is better",
    "regret": "utility lost against the best choice",
}


def table_block(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as a block; see `table_lines`."""
    return "\n".join(table_lines(header, rows)).rstrip("\n")


def write_page(directory: Place, blocks: Iterable[str]) -> Place:
    """Write both files, the words that they use explained at the end; the path of `report.md`.

    Args:
        directory: where the figures are that the blocks name. blocks: the first is the title.
    """
    shown = [block for block in blocks if block]
    text = "\n\n".join([*shown, *_glossary("\n".join(shown))]) + "\n"
    write_atomically(directory / "report.md", text.encode())
    write_atomically(directory / "report.html", _as_html(text, directory).encode())
    return directory / "report.md"


def _glossary(text: str) -> list[str]:
    lowered = text.lower()
    used = [f"- **{word}**: {meaning}." for word, meaning in _WORDS.items() if word.lower() in lowered]
    return ["## Words", "\n".join(used)] if used else []


def _as_html(text: str, directory: Place) -> str:
    """The text as a page of its own, figures as data."""
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": False}).enable("table")

    def figure(renderer: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
        source, caption = str(tokens[index].attrs["src"]), html.escape(tokens[index].content)
        data = base64.b64encode((directory / source).read_bytes()).decode()
        return f'<img alt="{caption}" src="data:image/png;base64,{data}">'

    reader.add_render_rule("image", figure)
    title = html.escape(text.split("\n", 1)[0].lstrip("# "))
    return FRAME.replace("TITLE", title, 1).replace("CONTENT", reader.render(text), 1)
