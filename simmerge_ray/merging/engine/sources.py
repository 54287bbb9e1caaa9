"""Ranges of tensors read into reused buffers, as float32: plain reads, not page faults on a memory map.

Of a checkpoint in a store only what is asked for is read, block by block through the node's cache.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from simmerge_ray.base.storage import Place, RangeReader, open_ranges
from simmerge_ray.checkpoints.adapters import LoraAdapter
from simmerge_ray.checkpoints.headers import TensorSpec, read_headers
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.engine import kernels
from simmerge_ray.merging.graph import DTYPE_BYTES, MergeGraph

# bfloat16 has no numpy type: its bits are read as uint16.
NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}  # fmt: skip


class TensorSource:
    """The tensors of one checkpoint, by name and range of elements. May be used from several threads."""

    def __init__(self, ref: CheckpointRef) -> None:
        self._ref = ref
        self.specs = read_headers(ref)
        self._adapter = LoraAdapter(ref, self.specs) if ref.adapter is not None else None
        self._files: dict[Place, RangeReader] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        for reader in self._files.values():
            reader.close()
        self._files.clear()

    def read_raw(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Elements [start, stop) of a tensor in its stored dtype (bfloat16 as uint16), flat, read into `out`.

        Raises CheckpointError: the file ends early, or cannot be read. StorageError: see `retried`.
        """
        spec = self.specs[name]
        size = DTYPE_BYTES[spec.dtype]
        num_bytes = (stop - start) * size
        buffer = np.empty(num_bytes, dtype=np.uint8) if out is None else out[:num_bytes]
        try:
            done = self._reader(spec).read_into(spec.begin + start * size, memoryview(buffer.data), spec.end)
            if done < num_bytes:
                raise self._ref.error(f"{spec.file} ends inside tensor {name}")
        except OSError as error:
            raise self._ref.error(f"cannot read {spec.file}: {error.strerror}") from None
        return buffer.view(NUMPY_DTYPES[spec.dtype])

    def read_float32(self, name: str, start: int, stop: int, raw: np.ndarray, out: np.ndarray) -> np.ndarray:
        """The same as float32, in `out`; `raw` is room for the stored bytes."""
        values = self._stored_float32(name, start, stop, raw, out)
        if self.is_adapted(name):
            assert self._adapter is not None
            self._adapter.apply(name, start, values, partial(self._fresh_float32, name))
        return values

    def _stored_float32(self, name: str, start: int, stop: int, raw: np.ndarray, out: np.ndarray) -> np.ndarray:
        dtype = self.specs[name].dtype
        values = out[: stop - start]
        if dtype == "F32":
            self.read_raw(name, start, stop, values.view(np.uint8))
        elif dtype == "BF16":
            kernels.widen_bf16(self.read_raw(name, start, stop, raw), values)
        else:
            values[:] = self.read_raw(name, start, stop, raw)
        return values

    def _fresh_float32(self, name: str, start: int, stop: int) -> np.ndarray:
        """Stored values in a room of their own, for an adapter that must know more of a tensor than one block."""
        raw = np.empty((stop - start) * DTYPE_BYTES[self.specs[name].dtype], dtype=np.uint8)
        return self._stored_float32(name, start, stop, raw, np.empty(stop - start, dtype=np.float32))

    def is_adapted(self, name: str) -> bool:
        """Whether a LoRA adapter changes this tensor, so that its stored bytes are not its value."""
        return self._adapter is not None and self._adapter.changes(name)

    def read_whole(self, name: str) -> np.ndarray:
        """A whole tensor, flat: stored dtype (bfloat16 as uint16), or float32 where an adapter changes it."""
        count = math.prod(self.specs[name].shape)
        raw = self.read_raw(name, 0, count)
        if not self.is_adapted(name):
            return raw
        return self.read_float32(name, 0, count, raw.view(np.uint8), np.empty(count, dtype=np.float32))

    def _reader(self, spec: TensorSpec) -> RangeReader:
        with self._lock:
            if spec.file not in self._files:
                self._files[spec.file] = open_ranges(spec.file)
            return self._files[spec.file]


@contextmanager
def open_sources(graph: MergeGraph) -> Iterator[dict[str, TensorSource]]:
    """The checkpoints that a graph reads, by id, closed at the end."""
    sources = {key: TensorSource(ref) for key, ref in graph.checkpoints.items()}
    try:
        yield sources
    finally:
        for source in sources.values():
            source.close()
