"""What an adapter does to one tensor: each change takes a range of the tensor's float32 values and alters it in place.

Only what a range needs is computed or read; nothing of the size of a tensor is held.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from simmerge_ray.base.storage import read_range
from simmerge_ray.checkpoints.headers import TensorSpec

# (start, stop) -> float32 values of the tensor as they are before the change.
Below = Callable[[int, int], np.ndarray]

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}
_NORM_ELEMENTS = 1 << 20


class Change(Protocol):
    """One change of one tensor."""

    def apply(self, start: int, values: np.ndarray, below: Below) -> None:
        """Change `values`, the flat elements of the tensor from `start` on."""


@dataclass(frozen=True)
class LowRank:
    """`W + scale * up @ down`; transposed where the layer stores its weight so."""

    up: np.ndarray  # (rows, rank)
    down: np.ndarray  # (rank, columns)
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def apply(self, start: int, values: np.ndarray, below: Below) -> None:
        width = self.down.shape[1]
        first, last = start // width, -(-(start + values.size) // width)
        offset = start - first * width
        rows = self.scale * (self.up[first:last] @ self.down)
        values += rows.reshape(-1)[offset : offset + values.size]


@dataclass(frozen=True)
class Magnitudes:
    """DoRA: every output's weights are scaled to a learnt norm. Liu et al. 2024, arXiv:2402.09353.

    magnitude: the norms. is_row: an output is a row of the stored tensor (a linear layer), else a column (a layer that
    stores the transpose, and an embedding). The norms before are found in one pass over the tensor.
    """

    magnitude: np.ndarray
    shape: tuple[int, int]
    is_row: bool
    _factors: list[np.ndarray] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def apply(self, start: int, values: np.ndarray, below: Below) -> None:
        with self._lock:
            if not self._factors:
                self._factors.append(self._make(below))
        factors, width = self._factors[0], self.shape[1]
        places = np.arange(start, start + values.size)
        values *= factors[places // width if self.is_row else places % width]

    def _make(self, below: Below) -> np.ndarray:
        num_rows, width = self.shape
        squares = np.zeros(num_rows if self.is_row else width, dtype=np.float64)
        step = max(1, _NORM_ELEMENTS // width)
        for first in range(0, num_rows, step):
            last = min(first + step, num_rows)
            block = below(first * width, last * width).reshape(last - first, width).astype(np.float64)
            if self.is_row:
                squares[first:last] = np.square(block).sum(axis=1)
            else:
                squares += np.square(block).sum(axis=0)
        return (self.magnitude / np.sqrt(squares)).astype(np.float32)


@dataclass(frozen=True)
class Replaced:
    """The tensor of the adapter's own file: `modules_to_save`, a trained bias, a saved embedding."""

    spec: TensorSpec

    def apply(self, start: int, values: np.ndarray, below: Below) -> None:
        values[:] = read_floats(self.spec, start, start + values.size)


@dataclass(frozen=True)
class Added:
    """A vector added to the tensor: the bias of a LoRA layer, times its scale."""

    vector: np.ndarray

    def apply(self, start: int, values: np.ndarray, below: Below) -> None:
        values += self.vector[start : start + values.size]


@dataclass(frozen=True)
class TrainedRows:
    """Rows of an embedding that are replaced: `trainable_token_indices`."""

    rows: dict[int, np.ndarray]
    width: int

    def apply(self, start: int, values: np.ndarray, below: Below) -> None:
        stop = start + values.size
        for index, row in self.rows.items():
            begin, end = max(start, index * self.width), min(stop, (index + 1) * self.width)
            if begin < end:
                values[begin - start : end - start] = row[begin - index * self.width : end - index * self.width]


def read_floats(spec: TensorSpec, start: int, stop: int) -> np.ndarray:
    """Elements [start, stop) of a tensor stored as F32, F16 or BF16, as float32."""
    width = WIDTHS[spec.dtype]
    data = read_range(spec.file, spec.begin + start * width, spec.begin + stop * width)
    if spec.dtype == "BF16":
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, dtype={"F32": "<f4", "F16": "<f2"}[spec.dtype]).astype(np.float32)


def same_values(first: TensorSpec, other: TensorSpec) -> bool:
    """Whether two tensors of the same file are equal."""
    if (first.shape, first.dtype) != (other.shape, other.dtype):
        return False
    num = math.prod(first.shape)
    return all(
        np.array_equal(read_floats(first, start, stop), read_floats(other, start, stop))
        for start in range(0, num, _NORM_ELEMENTS)
        for stop in (min(start + _NORM_ELEMENTS, num),)
    )
