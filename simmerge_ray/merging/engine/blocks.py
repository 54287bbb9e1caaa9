"""Blocks of a tensor's tree of operators: what one thread holds while it computes a tensor block by block.

Block by block means passes over the inputs: first one or two for what an operator must know of the whole tensor (the
angle of SLERP, the thresholds of TIES), innermost steps first, then the pass that makes the result. Memory is a few
blocks, whatever the size of the tensor and the length of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from simmerge_ray.merging.engine import kernels
from simmerge_ray.merging.engine.raw_blocks import RawBlocks
from simmerge_ray.merging.engine.rows import RowBlocks
from simmerge_ray.merging.engine.sources import TensorSource
from simmerge_ray.merging.engine.trims import Trim
from simmerge_ray.merging.graph import Apply, Node, OutputTensor, Read, Rows
from simmerge_ray.merging.row_layouts import RowLayout

# Inputs as bits -> the output's bits, put into the second argument; returns whether one is NaN or infinite.
StoredKernel = Callable[[list[np.ndarray], np.ndarray], bool]


@dataclass
class Notes:
    """As in `TensorReport`. bad_input: an input is not finite, which the operator may drop from the result."""

    fell_back: set[int] = field(default_factory=set)
    bad_input: bool = False


@dataclass(frozen=True)
class BlockForm:
    """An operator block by block.

    block: float32 values of a node from an offset on. fits: whether the node's parameters allow it; otherwise the
    torch operator makes the tensor as a whole. prepare: finds out what the operator must know of the whole tensor.
    stored_inputs, stored_kernel: a loop of its own where these inputs (none: not for this node) are stored as bfloat16.
    """

    block: Callable[[Blocks, Apply, int], np.ndarray]
    fits: Callable[[Apply], bool] = lambda node: True
    prepare: Callable[[Blocks, Apply], None] | None = None
    stored_inputs: Callable[[Apply], tuple[Node, ...]] = lambda node: ()
    stored_kernel: Callable[[Blocks, Apply], StoredKernel] | None = None


class Blocks:
    """The buffers of one thread, and what its operators know of the current tensor.

    arcs: by node, the weights of left and right on the arc between them. trims: by node.
    """

    def __init__(
        self,
        sources: Mapping[str, TensorSource],
        forms: Mapping[str, BlockForm],
        layouts: Mapping[str, RowLayout] | None = None,
    ) -> None:
        self.sources = sources
        self._rows = RowBlocks(sources, layouts or {}, self._round)
        self.raw = np.empty(kernels.BLOCK * 8, dtype=np.uint8)
        self.out = np.empty(kernels.BLOCK * 8, dtype=np.uint8)
        self._forms = forms
        self._raw_blocks = RawBlocks(sources)
        self._free: list[np.ndarray] = []

    def restart(self, output: OutputTensor, notes: Notes) -> None:
        """Begin a tensor."""
        self.output, self.notes = output, notes
        self.arcs: dict[int, tuple[float, float]] = {}
        self.trims: dict[int, Trim] = {}
        self._raw_blocks.forget()

    def prepare(self, node: Node) -> None:
        """Find out what the operators of a tree must know of the whole tensor, innermost first."""
        if isinstance(node, Apply):
            for inner in node.inputs:
                self.prepare(inner)
            if prepare := self._forms[node.operator].prepare:
                prepare(self, node)

    def starts(self) -> range:
        """Offsets of the blocks of a new pass."""
        for trim in self.trims.values():
            trim.restart()
        return range(0, self.output.num_elements, kernels.BLOCK)

    def give(self, *blocks: np.ndarray) -> None:
        """Hand back blocks that are no longer needed."""
        self._free.extend(block.base if block.base is not None else block for block in blocks)

    def block(self, node: Node, start: int) -> np.ndarray:
        """float32 values of a prepared node from `start` on, in a buffer that the caller gives back."""
        if isinstance(node, Apply):
            values = self._forms[node.operator].block(self, node, start)
            self._round(values, node.round_to)
            return values
        stop = min(start + kernels.BLOCK, self.output.num_elements)
        room = self._free.pop() if self._free else np.empty(kernels.BLOCK, dtype=np.float32)
        if isinstance(node, Rows):
            return self._rows.read(node, start, stop, self.output.input_dtype, room)
        values = self.sources[node.checkpoint].read_float32(node.tensor, start, stop, self.raw, room)
        self._round(values, self.output.input_dtype)
        return values

    def task_vectors(self, node: Apply, start: int) -> tuple[np.ndarray, ...]:
        """(base, source - base, ...) of a block."""
        assert node.base is not None
        base, *vectors = (self.block(inner, start) for inner in node.inputs)
        for vector in vectors:
            kernels.subtract(vector, base)
        return base, *vectors

    def _round(self, values: np.ndarray, dtype: str | None) -> None:
        """Round in place to a narrower dtype."""
        if dtype == "BF16":
            bits = self.out[: values.size * 2].view(np.uint16)
            kernels.narrow_bf16(values, bits)
            kernels.widen_bf16(bits, values)
        elif dtype == "F16":
            values[:] = values.astype(np.float16)

    def stored_bf16(self, node: Node) -> tuple[Read, ...]:
        """The inputs of the operator's own loop over stored bfloat16; none where it has no such loop or inputs."""
        if not isinstance(node, Apply) or self.output.input_dtype not in (None, "BF16"):
            return ()
        inputs = self._forms[node.operator].stored_inputs(node)
        stored = tuple(inner for inner in inputs if isinstance(inner, Read) and self._is_stored_bf16(inner))
        return stored if len(stored) == len(inputs) else ()

    def _is_stored_bf16(self, read: Read) -> bool:
        source = self.sources[read.checkpoint]
        return source.specs[read.tensor].dtype == "BF16" and not source.is_adapted(read.tensor)

    def stored_kernel(self, node: Apply) -> StoredKernel:
        """The loop over `stored_bf16` of a prepared node."""
        make = self._forms[node.operator].stored_kernel
        assert make is not None
        return make(self, node)

    def stored_pass(self, stored: tuple[Read, ...]) -> Iterator[tuple[int, list[np.ndarray]]]:
        """(offset, bits of each tensor) of all blocks."""
        for trim in self.trims.values():
            trim.restart()
        return self._raw_blocks.blocks(stored, self.output.num_elements)
