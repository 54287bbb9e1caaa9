"""A merge as an iterator of named tensors in memory: what a live evaluation engine loads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from simmerge_ray.errors import CheckpointError
from simmerge_ray.merge_graph import OutputTensor
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.compute import Computer, Seeds, TensorReport
from simmerge_ray.merging.global_trims import resolve_global_trims
from simmerge_ray.merging.sources import NUMPY_DTYPES, TensorSource
from simmerge_ray.plans import ResolvedPlan

if TYPE_CHECKING:
    from torch import Tensor


def merged_tensors(resolved: ResolvedPlan, reports: list[TensorReport] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of the merge, one at a time, in name order: the bytes that `write_merge` would write.

    Args:
        reports: gets one entry a tensor. Inputs are taken as checked (`check_compatible`).

    Raises:
        PlanError: see `global_trims.global_steps`. CheckpointError: see `Computer.compute`.
    """
    graph = resolve_global_trims(compile_plan(resolved, check=False), num_threads=1)
    sources = {key: TensorSource(ref) for key, ref in graph.checkpoints.items()}
    try:
        computer = Computer(graph, sources, Seeds(graph))
        for output in graph.outputs:
            array = np.empty(output.num_elements, dtype=NUMPY_DTYPES[output.dtype])

            def keep(start: int, block: np.ndarray, into: np.ndarray = array) -> None:
                into[start : start + block.size] = block

            report = computer.compute(output, keep)
            if reports is not None:
                reports.append(report)
            yield output.name, as_tensor(array, output)
    finally:
        for source in sources.values():
            source.close()


def as_tensor(array: np.ndarray, output: OutputTensor) -> Tensor:
    """A flat array of an output's elements as a tensor of its shape, without a copy."""
    return flat_tensor(array).reshape(output.shape)


def flat_tensor(array: np.ndarray) -> Tensor:
    """A flat array as a tensor, without a copy; uint16 holds the bits of bfloat16."""
    import torch

    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class FiniteStream:
    """`merged_tensors` for an evaluation engine, where a merge that is not finite must not be measured.

    The stream itself never stops at such a tensor: an engine whose loading breaks off in the middle is unusable.
    Call `check` when it has been consumed.
    """

    def __init__(self, resolved: ResolvedPlan) -> None:
        self._resolved = resolved
        self._reports: list[TensorReport] = []

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return merged_tensors(self._resolved, self._reports)

    def check(self) -> None:
        """Refuse what was streamed.

        Raises:
            CheckpointError: a tensor of the merge holds NaN or infinity.
        """
        for report in self._reports:
            if report.not_finite:
                label = self._resolved.plan.label
                raise CheckpointError(f"merge {label!r}: tensor {report.name} holds NaN or infinity")
