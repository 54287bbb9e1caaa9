"""How far a search is, in numbers and in one line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

NUM_ALIKE = 5  # trials, the first of a run, that end it when all of them fail for the same reason
_VARIABLE = re.compile(r"0x[0-9a-f]+|[0-9a-f]{8,}|\d+")  # numbers of processes, addresses, seconds


def cause(trial: str, reason: str) -> str:
    """A reason without what is of one trial alone: its name, and numbers."""
    return _VARIABLE.sub("#", reason.replace(trial, "the merge"))


@dataclass
class SearchStatus:
    """How far a search is; `best` has the label of a merge and its utility.

    failed: trials without a utility. num_items: evaluated in this run. failures: (trial, reason), in order of time.
    setbacks: likewise, of trials that have lost an actor and are tried again.
    """

    total: int
    done: int = 0
    failed: int = 0
    num_items: int = 0
    best: tuple[str, float] | None = None
    seconds: float = 0.0
    failures: list[tuple[str, str]] = field(default_factory=list)
    setbacks: list[tuple[str, str]] = field(default_factory=list)

    @property
    def items_per_second(self) -> float:
        return self.num_items / self.seconds if self.seconds > 0 else 0.0

    @property
    def line(self) -> str:
        """Failed trials, items per second and the best merge so far."""
        failed = f"{self.failed} failed, " if self.failed else ""
        best = f", best {self.best[1]:.3f} {self.best[0]}" if self.best else ""
        return f"{failed}{self.items_per_second:.0f} items/s{best}"

    @property
    def hopeless(self) -> str | None:
        """Why it is of no use to go on: the first trials have all failed for one reason."""
        if self.failed < NUM_ALIKE or self.failed < self.done or len(self.failures) < self.failed:
            return None
        reasons = {cause(*failure) for failure in self.failures}
        if len(reasons) > 1:
            return None
        return (
            f"the first {self.failed} merges all failed alike, so the search stops: {self.failures[0][1]} "
            "(`--retry-infeasible` tries them again)"
        )
