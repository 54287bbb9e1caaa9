"""Tensors laid out anew row by row, in blocks: rows are read where they lie, runs of them at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from simmerge_ray.merging.engine.sources import TensorSource
from simmerge_ray.merging.graph import DTYPE_BYTES, Rows
from simmerge_ray.merging.row_layouts import AVERAGE, ZERO, RowLayout

Cast = Callable[[np.ndarray, str | None], None]  # rounds float32 values in place to a dtype
_MEAN_ROWS = 256


class RowBlocks:
    """Reads blocks of `Rows` for one thread. Memory: a block, and one row for the mean of each padded tensor."""

    def __init__(self, sources: Mapping[str, TensorSource], layouts: Mapping[str, RowLayout], cast: Cast) -> None:
        self._sources, self._layouts, self._cast = sources, layouts, cast
        self._means: dict[tuple[Rows, str | None], np.ndarray] = {}
        self._raw = np.empty(0, dtype=np.uint8)

    def read(self, node: Rows, start: int, stop: int, input_dtype: str | None, out: np.ndarray) -> np.ndarray:
        """Elements [start, stop) of the flat result in `out`, float32 or float64; inputs are cast to `input_dtype`."""
        layout, width = self._layouts[node.layout], self._width(node)
        out = out[: stop - start]
        first, last = start // width, -(-stop // width)
        for begin, end in layout.runs(first, last):
            low, high = max(start, begin * width), min(stop, end * width)
            part = out[low - start : high - start]
            source, shift = int(layout.sources[begin]), low - begin * width
            if source == ZERO:
                part[:] = 0
            elif source == AVERAGE:
                row = self._average(node, layout.averages[begin], input_dtype, np.empty(width, dtype=out.dtype))
                part[:] = row[shift : shift + part.size]
            else:
                self._row(node, source, int(layout.rows[begin]) * width + shift, input_dtype, part)
        if last > layout.num_tokens:
            low = max(start, layout.num_tokens * width)
            places = np.arange(low, stop) % width
            out[low - start :] = self._mean(node, width, input_dtype, out.dtype)[places]
        return out

    def _width(self, node: Rows) -> int:
        read = node.sources[0]
        return math.prod(self._sources[read.checkpoint].specs[read.tensor].shape[1:])

    def _row(self, node: Rows, source: int, begin: int, input_dtype: str | None, part: np.ndarray) -> None:
        """Elements of one source from `begin` on, as many as there is room for."""
        read = node.sources[source]
        reader = self._sources[read.checkpoint]
        stored = reader.specs[read.tensor].dtype
        if stored == "F64" and part.dtype == np.float64:
            part[:] = reader.read_raw(read.tensor, begin, begin + part.size)
            return
        needed = part.size * DTYPE_BYTES[stored]
        if self._raw.size < needed:
            self._raw = np.empty(needed, dtype=np.uint8)
        values = part if part.dtype == np.float32 else np.empty(part.size, dtype=np.float32)
        reader.read_float32(read.tensor, begin, begin + part.size, self._raw, values)
        self._cast(values, input_dtype)
        part[:] = values

    def _average(
        self, node: Rows, parts: tuple[tuple[int, int], ...], input_dtype: str | None, one: np.ndarray
    ) -> np.ndarray:
        """The mean of some rows, rounded as mergekit does after every step; `one` is room for a row."""
        total = np.zeros_like(one)
        for source, row in parts:
            self._row(node, source, row * one.size, input_dtype, one)
            total += one
            self._cast(total, node.dtype)
        total /= total.dtype.type(len(parts))
        self._cast(total, node.dtype)
        return total

    def _mean(self, node: Rows, width: int, input_dtype: str | None, dtype: np.dtype[Any]) -> np.ndarray:
        """Mean of all rows of tokens, found in one pass."""
        key = node, input_dtype
        if key not in self._means:
            num = self._layouts[node.layout].num_tokens
            total = np.zeros(width, dtype=np.float64)
            for first in range(0, num, _MEAN_ROWS):
                last = min(first + _MEAN_ROWS, num)
                block = np.empty((last - first) * width, dtype=dtype)
                self.read(node, first * width, last * width, input_dtype, block)
                total += block.reshape(-1, width).sum(axis=0, dtype=np.float64)
            mean = (total / max(num, 1)).astype(dtype)
            self._cast(mean, node.dtype)
            self._means[key] = mean
        return self._means[key]
