"""Does a page say what was computed? Passages of Markdown with the numbers that belong into them.

A passage is what stands around the numbers, with `{}` for each; white space in it stands for any, so a page may be
wrapped anew. Everything else on the page is the author's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_SLOT = "{}"
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
# Not in code, nor in links and pictures, nor a part of a word such as `s1`.
_NO_STATEMENT = re.compile(
    r"```.*?```|`[^`]*`|\]\([^)]*\)|^#[^\n]*|\b[A-Za-z]+[\w.:/-]*\d[\w.:/-]*", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Said:
    """A passage and the computed values of its places, as a page writes them; None is not compared.

    digits_apart: by how many units of its last digit a number may differ; 0 where the arithmetic is exact.

    Raises ValueError: another number of values than places, or a passage that begins or ends with one.
    """

    passage: str
    values: tuple[str | None, ...]
    digits_apart: int = 0

    def __post_init__(self) -> None:
        ends = (self.passage.strip().startswith(_SLOT), self.passage.strip().endswith(_SLOT))
        if self.passage.count(_SLOT) != len(self.values) or any(ends):
            raise ValueError(f"{len(self.values)} values with text before and behind them do not fit {self.passage!r}")


@dataclass(frozen=True)
class Mismatch:
    """place: line of the page, or the passage that it has not."""

    place: str
    says: str
    computed: str

    def __str__(self) -> str:
        return f"{self.place}: the page says {self.says}, computed {self.computed}"


@dataclass(frozen=True)
class Checked:
    """What a page was found to say. num_values: compared. unchecked: (line, number) that no passage holds."""

    mismatches: tuple[Mismatch, ...]
    num_values: int
    unchecked: tuple[tuple[int, str], ...]


def check_page(text: str, claims: Sequence[Said]) -> Checked:
    """Compare a page with what was computed. A passage that stands on it several times is compared each time."""
    mismatches, held, num_values = [], list[tuple[int, int]](), 0
    for claim in claims:
        found = list(_pattern(claim.passage).finditer(text))
        if not found:
            shown = " ".join(claim.passage.split())
            computed = ", ".join(value for value in claim.values if value is not None)
            mismatches.append(Mismatch(f"{shown!r}", "nothing of the kind", computed))
        for match in found:
            held.append(match.span())
            for place, value in enumerate(claim.values, 1):
                if value is None:
                    continue
                num_values += 1
                says = " ".join(match.group(place).replace("*", "").split())
                if not _equal(says, value, claim.digits_apart):
                    line = text.count("\n", 0, match.start(place)) + 1
                    mismatches.append(Mismatch(f"line {line}", says, value))
    return Checked(tuple(mismatches), num_values, tuple(_unchecked(text, held)))


def _pattern(passage: str) -> re.Pattern[str]:
    parts = [r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in passage.split(_SLOT)]
    return re.compile(r"([^|]{1,60}?)".join(parts))


def _equal(says: str, computed: str, digits_apart: int) -> bool:
    """Whether all is the same but for numbers, and these differ by no more than that."""
    if _NUMBER.sub("#", says) != _NUMBER.sub("#", computed):
        return False
    pairs = zip(_NUMBER.findall(says), _NUMBER.findall(computed), strict=True)
    return all(_apart(one, other) <= digits_apart for one, other in pairs)


def _apart(says: str, computed: str) -> float:
    """In units of the last digit; endlessly where they have not the same number of digits behind the point."""
    digits = [len(text.partition(".")[2]) for text in (says, computed)]
    first, second = (float(text.replace(",", "")) for text in (says, computed))
    return abs(round((first - second) * 10 ** digits[0])) if digits[0] == digits[1] or first == second else float("inf")


def _unchecked(text: str, held: Sequence[tuple[int, int]]) -> list[tuple[int, str]]:
    rest = list(text)
    spans = [*held, *(match.span() for match in _NO_STATEMENT.finditer(text))]
    for start, end in spans:
        rest[start:end] = [char if char == "\n" else " " for char in rest[start:end]]
    left = "".join(rest)
    return [(left.count("\n", 0, match.start()) + 1, match.group()) for match in _NUMBER.finditer(left)]
