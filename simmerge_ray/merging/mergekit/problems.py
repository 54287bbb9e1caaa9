"""What is wrong with a file, collected: every problem is reported, in one message."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from simmerge_ray.base.errors import PlanError, problem_list


def raise_problems(problems: Iterable[str], title: str) -> None:
    """One PlanError with all problems, one a line; none is no error."""
    if lines := list(dict.fromkeys(problems)):
        raise PlanError(problem_list(title, lines))


def shorten(value: object) -> str:
    """A value of the file, shortened."""
    return reprlib.repr(value)


class Problems:
    """The problems of one document, each with its place; `root` is the place of the document itself.

    ignored: what has no effect, as in mergekit; it may be a slip.
    """

    def __init__(self, lines: list[str], root: str) -> None:
        self._lines, self._root = lines, root
        self.ignored: list[str] = []

    def report(self, place: str, message: str) -> None:
        self._lines.append(self._line(place, message))

    def ignore(self, place: str, message: str) -> None:
        self.ignored.append(self._line(place, message))

    def _line(self, place: str, message: str) -> str:
        place = ".".join(filter(None, (self._root, place)))
        return f"{place}: {message}" if place else message

    def mapping(self, value: object, place: str, known: Iterable[str]) -> dict[str, Any] | None:
        """`value` with its known keys, the others ignored by name; None if it is no mapping."""
        if not isinstance(value, Mapping):
            self.report(place, f"a mapping is needed, got {shorten(value)}")
            return None
        known = tuple(known)
        for key in value:
            if key not in known:
                shown = str(key)[:100]
                where = f"{place}.{shown}" if place else shown
                near = difflib.get_close_matches(shown, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                self.ignore(where, f"unknown key, ignored; {hint}")
        return {key: value[key] for key in value if key in known}

    def list_of(self, value: object, place: str) -> list[Any]:
        if value is None:
            return []
        if not isinstance(value, list):
            self.report(place, f"a list is needed, got {shorten(value)}")
            return []
        return value
