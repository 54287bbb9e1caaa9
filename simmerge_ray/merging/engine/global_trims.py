"""TIES trimmed over the whole model: its thresholds depend on all tensors, so they are found before any is made.

Two passes over the tensors of a step add up histograms of magnitudes, as the trimming of one tensor does. The result is
a graph in which every tensor knows its thresholds: whatever makes it (threads, tasks of a cluster, a stream) makes the
same bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from simmerge_ray.base.errors import PlanError
from simmerge_ray.checkpoints.headers import TensorSpec, read_headers
from simmerge_ray.merging.engine.compute import Computer
from simmerge_ray.merging.engine.seeds import Seeds
from simmerge_ray.merging.engine.sources import TensorSource, open_sources
from simmerge_ray.merging.engine.trims import NUM_HIGH, NUM_LOW, densities, exact_thresholds, top_bins
from simmerge_ray.merging.graph import FLOAT_DTYPES, Apply, MergeGraph, Node, OutputTensor, applies, reads
from simmerge_ray.plans.operators.shares import kept_count

Result = TypeVar("Result")
_Bins = tuple[np.ndarray, np.ndarray]  # bins that are taken, and the counts there


@dataclass(frozen=True)
class _Target:
    """A TIES step at one tensor."""

    output: OutputTensor
    node: Apply


def global_steps(graph: MergeGraph) -> list[int]:
    """Numbers of the steps that trim over the whole model and whose thresholds are not known, in their order.

    Raises PlanError: such a step has a density that differs between tensors, or float64 tensors.
    """
    found = _targets(graph, _is_open)
    if found:
        specs = {key: read_headers(ref) for key, ref in graph.checkpoints.items()}
        for step, targets in found.items():
            _check(step, targets, specs)
    return sorted(found)


def resolve_global_trims(graph: MergeGraph, num_threads: int) -> MergeGraph:
    """The graph with the thresholds of all `global_steps` found; the graph itself if there are none.

    Every step keeps `max(1, int(density * n))` of the n entries of all its tensors; of equal ones the first in the
    order of tensor names, then of a tensor's entries.
    """
    if not global_steps(graph):
        return graph
    with open_sources(graph) as sources:
        while targets := _targets(graph, _is_next):
            graph = _resolved(graph, targets[min(targets)], sources, num_threads)
    return graph


def _is_open(node: Apply) -> bool:
    return bool(node.param("trim_scope") == "global" and node.param("thresholds") is None)


def _is_next(node: Apply) -> bool:
    """Whether it is open, and what it takes is not."""
    return _is_open(node) and not any(_is_open(earlier) for inner in node.inputs for earlier in applies(inner))


def _targets(graph: MergeGraph, which: Callable[[Apply], bool]) -> dict[int, list[_Target]]:
    """By step, in the order of tensor names; a node that makes several tensors counts once."""
    found: dict[int, dict[Apply, _Target]] = {}
    for output in graph.outputs:
        for node in applies(output.node) if output.dtype in FLOAT_DTYPES else ():
            if which(node):
                found.setdefault(node.step, {}).setdefault(node, _Target(output, node))
    return {step: list(targets.values()) for step, targets in found.items()}


def _check(step: int, targets: Sequence[_Target], specs: Mapping[str, Mapping[str, TensorSpec]]) -> None:
    if len(chosen := {densities(target.node) for target in targets}) > 1:
        shown = ", ".join(" and ".join(f"{value:g}" for value in dict.fromkeys(one)) for one in sorted(chosen)[:3])
        raise PlanError(
            f"step {step}: ties with trim_scope: global needs one density for all tensors, got {shown}; "
            "leave out the gradient or filter, or use trim_scope: tensor"
        )
    for target in targets:
        stored = {specs[read.checkpoint][read.tensor].dtype for read in reads(target.node)}
        if "F64" in (target.output.input_dtype, *stored):
            raise PlanError(
                f"step {step}: ties with trim_scope: global compares magnitudes in float32, and tensor "
                f"{target.output.name} is computed in float64; use trim_scope: tensor"
            )


def _resolved(
    graph: MergeGraph, targets: Sequence[_Target], sources: Mapping[str, TensorSource], num_threads: int
) -> MergeGraph:
    density = densities(targets[0].node)
    num_entries = sum(target.output.num_elements for target in targets)
    keep = [kept_count(value, num_entries) for value in density]

    def count_high(computer: Computer, mine: Iterator[_Target]) -> np.ndarray:
        counts = np.zeros((len(keep), NUM_HIGH), dtype=np.int64)
        for target in mine:
            computer.count_magnitudes(target.output, target.node, counts, None)
        return counts

    tops = top_bins(np.sum(_in_threads(graph, targets, sources, num_threads, count_high), axis=0), keep)

    def count_low(computer: Computer, mine: Iterator[_Target]) -> tuple[np.ndarray, dict[Apply, list[_Bins]]]:
        total, by_tensor = np.zeros((len(keep), NUM_LOW), dtype=np.int64), {}
        for target in mine:
            counts = np.zeros_like(total)
            computer.count_magnitudes(target.output, target.node, counts, tops)
            total += counts
            # What says later how many entries of this tensor equal the threshold; few of the bins are taken.
            by_tensor[target.node] = [_taken(row) for row in counts]
        return total, by_tensor

    parts = _in_threads(graph, targets, sources, num_threads, count_low)
    thresholds, left = exact_thresholds(tops, np.sum([total for total, _ in parts], axis=0), keep)
    counted = {node: rows for _, by_tensor in parts for node, rows in by_tensor.items()}
    found: dict[Apply, Apply] = {}
    for target in targets:
        budgets = []
        for number, (bins, counts) in enumerate(counted[target.node]):
            num_equal = int(counts[bins == (thresholds[number] & 0xFFFF)].sum())
            budgets.append(min(num_equal, int(left[number])))
            left[number] -= budgets[-1]
        params = dict(target.node.params)
        params |= {"thresholds": tuple(map(float, thresholds.view(np.float32))), "budgets": tuple(budgets)}
        found[target.node] = replace(target.node, params=tuple(sorted(params.items())))
    return replace(graph, outputs=tuple(replace(o, node=_with(o.node, found)) for o in graph.outputs))


def _taken(counts: np.ndarray) -> _Bins:
    bins = np.flatnonzero(counts)
    return bins.astype(np.uint16), counts[bins].astype(np.uint32)


def _with(node: Node, found: Mapping[Apply, Apply]) -> Node:
    """The tree with every node that is in `found` replaced."""
    if not isinstance(node, Apply):
        return node
    sources, base = tuple(_with(source, found) for source in node.sources), node.base and _with(node.base, found)
    return replace(found.get(node, node), sources=sources, base=base)


def _in_threads(
    graph: MergeGraph,
    targets: Sequence[_Target],
    sources: Mapping[str, TensorSource],
    num_threads: int,
    work: Callable[[Computer, Iterator[_Target]], Result],
) -> list[Result]:
    """`work` on shares of the targets, about equal, each with a `Computer` of its own."""
    ordered = sorted(targets, key=lambda target: (-target.output.num_elements, target.output.name))
    count, seeds, stop = max(1, min(num_threads, len(ordered))), Seeds(graph), threading.Event()

    def run(number: int) -> Result:
        return work(Computer(graph, sources, seeds), (one for one in ordered[number::count] if not stop.is_set()))

    with ThreadPoolExecutor(count, thread_name_prefix="trim") as pool:
        try:
            return list(pool.map(run, range(count)))
        finally:
            stop.set()  # after Ctrl-C or an error the others need not go to their ends
