"""Whole tensors by the torch operators: for those that cannot be cut into blocks, and for float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simmerge_ray.merging.engine.blocks import Notes
from simmerge_ray.merging.engine.rows import RowBlocks
from simmerge_ray.merging.engine.seeds import Seeds
from simmerge_ray.merging.engine.sources import NUMPY_DTYPES, TensorSource
from simmerge_ray.merging.graph import DTYPE_NAMES, Apply, Node, OutputTensor, Read, Rows
from simmerge_ray.merging.row_layouts import RowLayout
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS
from simmerge_ray.plans.operators.table import OPERATORS, fell_back
from simmerge_ray.plans.operators.task_vectors import task_vectors


class WholeTensors:
    """Makes the tensors of one graph."""

    def __init__(
        self, sources: Mapping[str, TensorSource], seeds: Seeds, layouts: Mapping[str, RowLayout] | None = None
    ) -> None:
        self._sources, self._seeds = sources, seeds
        self._rows = RowBlocks(sources, layouts or {}, _cast)

    def array(self, output: OutputTensor, notes: Notes) -> tuple[np.ndarray, bool]:
        """(flat array in the output's dtype, whether it holds NaN or infinity)."""
        result = self._make(output.node, output, notes).to(_torch_dtype(output.dtype)).contiguous().reshape(-1)
        array = (result.view(torch.int16) if output.dtype == "BF16" else result).numpy()
        return array.view(NUMPY_DTYPES[output.dtype]), not bool(torch.isfinite(result).all())

    def task_vectors(self, node: Apply, output: OutputTensor, notes: Notes) -> list[np.ndarray]:
        """Those of a node's sources, flat."""
        base, tensors = self._inputs(node, output, notes)
        _, vectors = task_vectors(node.operator, base, tensors, node.weights)
        return [vector.reshape(-1).numpy() for vector in vectors]

    def _inputs(self, node: Apply, output: OutputTensor, notes: Notes) -> tuple[Tensor | None, list[Tensor]]:
        base = self._make(node.base, output, notes) if node.base is not None else None
        return base, [self._make(source, output, notes) for source in node.sources]

    def _make(self, node: Node, output: OutputTensor, notes: Notes) -> Tensor:
        if isinstance(node, Read):
            source = self._sources[node.checkpoint]
            tensor = flat_tensor(source.read_whole(node.tensor)).reshape(source.specs[node.tensor].shape)
            notes.bad_input |= not bool(torch.isfinite(tensor).all())
            return tensor.to(_torch_dtype(output.input_dtype)) if output.input_dtype else tensor
        if isinstance(node, Rows):
            return self._laid_out(node, output, notes)
        base, tensors = self._inputs(node, output, notes)
        params: dict[str, Any] = dict(node.params)
        if fell_back(node.operator, base, tensors, **params):
            notes.fell_back.add(node.step)
        if OPERATOR_SPECS[node.operator].random:
            params["seeds"] = [self._seeds.of(source, node.step, output.name) for source in node.sources]
        if node.grams:
            params["grams"] = [self._make(gram, output, notes) for gram in node.grams]
        result = OPERATORS[node.operator](base, tensors, list(node.weights), **params)
        return result.to(_torch_dtype(node.round_to)).to(result.dtype) if node.round_to else result

    def _laid_out(self, node: Rows, output: OutputTensor, notes: Notes) -> Tensor:
        """float32, or float64 where that is the dtype of its sources."""
        wide = output.input_dtype or node.dtype
        values = np.empty(output.num_elements, dtype=np.float64 if "F64" in (wide, node.dtype) else np.float32)
        tensor = flat_tensor(self._rows.read(node, 0, values.size, output.input_dtype, values))
        notes.bad_input |= not bool(torch.isfinite(tensor).all())
        return tensor.reshape(output.shape)


def _cast(values: np.ndarray, dtype: str | None) -> None:
    if dtype in ("BF16", "F16"):
        values[:] = torch.from_numpy(values).to(_torch_dtype(dtype)).to(torch.float32).numpy()


def flat_tensor(array: np.ndarray) -> Tensor:
    """A flat array as a tensor, without a copy; uint16 holds the bits of bfloat16."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, DTYPE_NAMES[name])
    return dtype
