"""One tensor of a merge: block by block where the operators allow it, as a whole by the torch operators elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.merging.engine import kernels
from simmerge_ray.merging.engine.blocks import Blocks, Notes
from simmerge_ray.merging.engine.forms import FORMS, count_magnitudes, count_vectors, is_blockwise
from simmerge_ray.merging.engine.seeds import Seeds
from simmerge_ray.merging.engine.sources import NUMPY_DTYPES, TensorSource
from simmerge_ray.merging.engine.trims import Tops
from simmerge_ray.merging.graph import FLOAT_DTYPES, Apply, MergeGraph, OutputTensor, reads

if TYPE_CHECKING:
    from simmerge_ray.merging.engine.whole import WholeTensors

Emit = Callable[[int, np.ndarray], None]


@dataclass
class TensorReport:
    """What was noticed while a tensor was made.

    not_finite: it or an input holds NaN or infinity. fell_back: numbers of the steps (from 1) whose SLERP was linear.
    """

    name: str
    not_finite: bool = False
    fell_back: tuple[int, ...] = ()


class Computer:
    """Computes tensors of one graph; one object a thread (the sources may be shared)."""

    def __init__(self, graph: MergeGraph, sources: Mapping[str, TensorSource], seeds: Seeds | None = None) -> None:
        self._sources = sources
        self._seeds = seeds or Seeds(graph)
        self._blocks = Blocks(sources, FORMS, graph.layouts)
        self._layouts = graph.layouts
        self._stored_out = np.empty(kernels.PAIR_BLOCK, dtype=np.uint16)

    @cached_property
    def _whole(self) -> WholeTensors:
        from simmerge_ray.merging.engine.whole import WholeTensors  # a merge in blocks needs no torch

        return WholeTensors(self._sources, self._seeds, self._layouts)

    def compute(self, output: OutputTensor, emit: Emit) -> TensorReport:
        """Make one tensor; `emit(element offset, flat block in the output's dtype)` takes its parts in order.

        Raises CheckpointError: an input cannot be read, or integer tensors differ.
        """
        if output.dtype not in FLOAT_DTYPES:
            self._copy_equal(output, emit)
            return TensorReport(output.name)
        notes = Notes()
        not_finite = self._emit(output, notes, emit)
        return TensorReport(output.name, not_finite or notes.bad_input, tuple(sorted(notes.fell_back)))

    def array(self, output: OutputTensor) -> tuple[np.ndarray, TensorReport]:
        """`compute` into one flat array."""
        array = np.empty(output.num_elements, dtype=NUMPY_DTYPES[output.dtype])

        def keep(start: int, block: np.ndarray) -> None:
            array[start : start + block.size] = block

        report = self.compute(output, keep)
        return array, report

    def _emit(self, output: OutputTensor, notes: Notes, emit: Emit) -> bool:
        """Emit all parts; returns whether one holds NaN or infinity."""
        if not self._is_blockwise(output):
            array, not_finite = self._whole.array(output, notes)
            for start in range(0, output.num_elements, kernels.BLOCK):
                emit(start, array[start : start + kernels.BLOCK])
            return not_finite
        blocks, node, not_finite = self._blocks, output.node, False
        blocks.restart(output, notes)
        blocks.prepare(node)
        if output.dtype == "BF16" and isinstance(node, Apply) and (stored := blocks.stored_bf16(node)):
            kernel = blocks.stored_kernel(node)
            for start, bits in blocks.stored_pass(stored):
                out = self._stored_out[: bits[0].size]
                not_finite |= kernel(bits, out)
                emit(start, out)
            return not_finite
        for start in blocks.starts():
            values = blocks.block(node, start)
            not_finite |= self._emit_float32(values, output.dtype, start, emit)
            blocks.give(values)
        return not_finite

    def fallbacks(self, output: OutputTensor) -> set[int]:
        """Numbers of the steps whose SLERP is linear on this tensor, without making it."""
        notes = Notes()
        if output.dtype in FLOAT_DTYPES and self._is_blockwise(output):
            self._blocks.restart(output, notes)
            self._blocks.prepare(output.node)
        return notes.fell_back

    def count_magnitudes(self, output: OutputTensor, node: Apply, counts: np.ndarray, tops: Tops | None) -> None:
        """Add the magnitudes of the task vectors of a TIES step of a tensor; see `forms.count_magnitudes`."""
        if not self._is_blockwise(output):
            count_vectors(self._whole.task_vectors(node, output, Notes()), counts, tops)
            return
        self._blocks.restart(output, Notes())
        for inner in node.inputs:
            self._blocks.prepare(inner)
        count_magnitudes(self._blocks, node, counts, tops)

    def _is_blockwise(self, output: OutputTensor) -> bool:
        return is_blockwise(output, {key: source.specs for key, source in self._sources.items()})

    def _emit_float32(self, values: np.ndarray, dtype: str, start: int, emit: Emit) -> bool:
        if dtype == "BF16":
            bits = self._blocks.out[: values.size * 2].view(np.uint16)
            not_finite = kernels.narrow_bf16(values, bits)
            emit(start, bits)
            return bool(not_finite)
        with np.errstate(over="ignore"):  # what overflows becomes infinity and is reported
            block = values.astype(NUMPY_DTYPES[dtype], copy=False)
        emit(start, block)
        return not bool(np.isfinite(block).all()) if dtype == "F16" else bool(kernels.not_finite(values))

    def _copy_equal(self, output: OutputTensor, emit: Emit) -> None:
        first, *others = dict.fromkeys(reads(output.node))
        for start in range(0, output.num_elements, kernels.BLOCK):
            stop = min(start + kernels.BLOCK, output.num_elements)
            block = self._sources[first.checkpoint].read_raw(first.tensor, start, stop, self._blocks.raw)
            for other in others:
                theirs = self._sources[other.checkpoint].read_raw(other.tensor, start, stop, self._blocks.out)
                if not np.array_equal(block, theirs):
                    raise CheckpointError(
                        f"integer tensor {output.name} differs between {first.checkpoint!r} and {other.checkpoint!r}"
                    )
            emit(start, block)
