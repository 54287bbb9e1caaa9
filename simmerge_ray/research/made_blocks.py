"""Blocks of a page that are made from data: lines between `<!-- made: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from simmerge_ray.base.errors import ConfigError

_BLOCK = re.compile(r"<!-- made: ([\w-]+) -->\n(.*?)<!-- end -->", re.DOTALL)

Blocks = Mapping[str, Sequence[str]]
"""Lines by name."""


def filled_page(page: str, blocks: Blocks) -> str:
    """The page with every block made anew. Raises ConfigError: a name that stands on one side alone, or twice."""
    found = [name for name, _ in _BLOCK.findall(page)]
    if sorted(found) != sorted(blocks):
        raise ConfigError(f"the page has the blocks {sorted(found)}, made were {sorted(blocks)}")

    def made(match: re.Match[str]) -> str:
        return f"<!-- made: {match[1]} -->\n" + "".join(f"{line}\n" for line in blocks[match[1]]) + "<!-- end -->"

    return _BLOCK.sub(made, page)


def stale_lines(page: str, blocks: Blocks) -> list[str]:
    """What the page says otherwise than its data: line number, what stands there, what was made."""
    lines = zip_longest(page.splitlines(), filled_page(page, blocks).splitlines(), fillvalue="")
    return [
        f"line {number}: the page says {said.strip()!r}, the data {made.strip()!r}"
        for number, (said, made) in enumerate(lines, 1)
        if said != made
    ]
