"""Blocks of a page that are made from data: lines between `<!-- made: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.research.said import Checked, Mismatch, check_page

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


def check_blocks(page: str, blocks: Blocks) -> Checked:
    """Compare every line of the blocks with what was made; numbers of the prose around count as unchecked."""
    lines = zip_longest(page.splitlines(), filled_page(page, blocks).splitlines(), fillvalue="")
    mismatches = [
        Mismatch(f"line {number}", repr(said.strip()), repr(made.strip()))
        for number, (said, made) in enumerate(lines, 1)
        if said != made
    ]
    prose = _BLOCK.sub(lambda match: "\n" * match[0].count("\n"), page)
    num_values = sum(len(re.findall(r"\d+(?:\.\d+)?", line)) for one in blocks.values() for line in one)
    return Checked(tuple(mismatches), num_values, check_page(prose, ()).unchecked)
