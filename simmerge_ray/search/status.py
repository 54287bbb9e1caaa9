"""How far a search is, in numbers and in one line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SearchStatus:
    """How far a search is; `best` has the label of a merge and its utility.

    failed: trials without a utility. num_items: evaluated in this run.
    """

    total: int
    done: int = 0
    failed: int = 0
    num_items: int = 0
    best: tuple[str, float] | None = None
    seconds: float = 0.0

    @property
    def items_per_second(self) -> float:
        return self.num_items / self.seconds if self.seconds > 0 else 0.0

    @property
    def line(self) -> str:
        """Failed trials, items per second and the best merge so far."""
        failed = f"{self.failed} failed, " if self.failed else ""
        best = f", best {self.best[1]:.3f} {self.best[0]}" if self.best else ""
        return f"{failed}{self.items_per_second:.0f} items/s{best}"
