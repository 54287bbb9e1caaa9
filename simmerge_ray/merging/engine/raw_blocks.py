"""Blocks of several stored bfloat16 tensors at once, as bits, read into reused rooms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from simmerge_ray.merging.engine import kernels
from simmerge_ray.merging.engine.sources import TensorSource
from simmerge_ray.merging.graph import Read

KEPT_ELEMENTS = 1 << 20  # tensors up to this size are read once, however many passes an operator makes


class RawBlocks:
    """Passes over tensors of one shape. Memory: a room of `KEPT_ELEMENTS` for each tensor of a pass."""

    def __init__(self, sources: Mapping[str, TensorSource]) -> None:
        self._sources = sources
        self._rooms: list[np.ndarray] = []
        self._kept: tuple[Read, ...] = ()

    def forget(self) -> None:
        """Nothing is kept for the next pass: its tensors are others."""
        self._kept = ()

    def blocks(self, tensors: Sequence[Read], num_elements: int) -> Iterator[tuple[int, list[np.ndarray]]]:
        """(offset, bits (uint16) of each tensor) of all blocks, valid until the next."""
        wanted = tuple(tensors)
        # TIES looks at every block of a pass more than once, so its three fit the second cache together.
        size = kernels.PAIR_BLOCK if len(wanted) <= 2 else max(1, kernels.PAIR_BLOCK >> 2)
        while len(self._rooms) < len(wanted):
            self._rooms.append(np.empty(max(KEPT_ELEMENTS, kernels.PAIR_BLOCK) * 2, dtype=np.uint8))
        is_kept, fits = wanted == self._kept, num_elements <= KEPT_ELEMENTS
        for start in range(0, num_elements, size):
            stop = min(start + size, num_elements)
            begin = start * 2 if fits else 0
            rooms = [room[begin : begin + (stop - start) * 2] for room in self._rooms[: len(wanted)]]
            if is_kept:
                yield start, [room.view(np.uint16) for room in rooms]
            else:
                self._kept = ()
                pairs = zip(wanted, rooms, strict=True)
                yield (start, [self._sources[r.checkpoint].read_raw(r.tensor, start, stop, room) for r, room in pairs])
        if fits:
            self._kept = wanted
