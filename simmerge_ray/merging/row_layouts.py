"""Where each row of a tensor that is laid out anew comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from simmerge_ray.base.storage import digest_bytes, digest_json

ZERO, AVERAGE = -1, -2  # instead of the number of a source


@dataclass(frozen=True, eq=False)
class RowLayout:
    """A tensor of `num_rows` rows: first those of the tokens, then padding, which is their mean.

    sources: (tokens,) int32, number of the source of each row, or `ZERO`, or `AVERAGE`. rows: (tokens,) int64, the row
    there. averages: for an averaged row its (source, row), in the order in which they are added.
    """

    num_rows: int
    sources: np.ndarray
    rows: np.ndarray
    averages: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.sources)

    @cached_property
    def digest(self) -> str:
        """Identity, for the journal of an interrupted merge."""
        averages = sorted((row, list(parts)) for row, parts in self.averages.items())
        parts = (self.sources.astype("<i4").tobytes(), self.rows.astype("<i8").tobytes())
        return digest_bytes(*parts, digest_json([self.num_rows, averages]).encode())

    @cached_property
    def starts(self) -> np.ndarray:
        """Where runs of rows begin that follow each other in one source, and the end of the last."""
        jumps = (np.diff(self.sources) != 0) | ((np.diff(self.rows) != 1) & (self.sources[1:] >= 0))
        jumps |= self.sources[1:] == AVERAGE
        return np.concatenate([[0], np.flatnonzero(jumps) + 1, [self.num_tokens]]).astype(np.int64)

    def runs(self, first: int, last: int) -> list[tuple[int, int]]:
        """Ranges of rows [begin, end) that cover the tokens in [first, last), each within one run."""
        last = min(last, self.num_tokens)
        if first >= last:
            return []
        inner = self.starts[np.searchsorted(self.starts, first, "right") : np.searchsorted(self.starts, last, "left")]
        edges = [first, *(int(edge) for edge in inner), last]
        return list(zip(edges, edges[1:], strict=False))
