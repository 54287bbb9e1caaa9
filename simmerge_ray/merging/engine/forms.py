"""The table of operators that run block by block. All others take whole tensors, as does any that gets float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from simmerge_ray.checkpoints.headers import TensorSpec
from simmerge_ray.merging.engine import kernels
from simmerge_ray.merging.engine.blocks import BlockForm, Blocks, StoredKernel
from simmerge_ray.merging.engine.raw_blocks import KEPT_ELEMENTS
from simmerge_ray.merging.engine.trims import (
    NOT_FINITE,
    NUM_HIGH,
    NUM_LOW,
    Tops,
    Trim,
    densities,
    exact_thresholds,
    top_bins,
)
from simmerge_ray.merging.graph import FLOAT_DTYPES, Apply, MergeGraph, Node, OutputTensor, Read, Rows, applies, reads
from simmerge_ray.plans.operators.shares import (
    SLERP_THRESHOLD,
    cosine_of,
    interpolation_weights,
    is_straight,
    kept_count,
    right_share,
    sum_of_weights,
)
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS

_sum_of_weights = lru_cache(sum_of_weights)  # asked for with every block
_BLOCKWISE_DTYPES = ("F32", "BF16", "F16")
_PER_SOURCE = ("density", "thresholds", "budgets")
_KEPT_VECTORS = 1 << 20  # base and two task vectors of that size are 12 MB


# Sums


def _passthrough(blocks: Blocks, node: Apply, start: int) -> np.ndarray:
    values = blocks.block(node.sources[0], start)
    _scale(values, node)
    return values


def _linear(blocks: Blocks, node: Apply, start: int) -> np.ndarray:
    total = blocks.block(node.sources[0], start)
    _add_rest(blocks, node, start, total, None)
    if (divisor := _linear_divisor(node)) != 1.0:
        total /= np.float32(divisor)
    return total


def _task_arithmetic(blocks: Blocks, node: Apply, start: int) -> np.ndarray:
    assert node.base is not None
    total, base = blocks.block(node.sources[0], start), blocks.block(node.base, start)
    kernels.subtract(total, base)
    _add_rest(blocks, node, start, total, base)
    _scale(total, node)
    total += base
    blocks.give(base)
    return total


def _scale(values: np.ndarray, node: Apply) -> None:
    if (scale := float(node.param("scale", 1.0))) != 1.0:
        values *= np.float32(scale)


def _add_rest(blocks: Blocks, node: Apply, start: int, total: np.ndarray, base: np.ndarray | None) -> None:
    """`total`, the first source, becomes the weighted sum of all (of their task vectors where there is a base)."""
    weights = [np.float32(weight) for weight in node.weights]
    if len(weights) == 1:
        total *= weights[0]
    for number, source in enumerate(node.sources[1:], 1):
        values = blocks.block(source, start)
        if base is not None:
            kernels.subtract(values, base)
        factor = weights[0] if number == 1 else np.float32(1.0)
        kernels.blend_float32(total, values, factor, weights[number], base is None)
        blocks.give(values)


def _linear_stored(node: Apply) -> tuple[Node, ...]:
    # Only a division by a power of two may be done before the sum.
    return node.sources if len(node.sources) == 2 and math.frexp(_linear_divisor(node))[0] == 0.5 else ()


def _linear_kernel(_: Blocks, node: Apply) -> StoredKernel:
    return _blend_kernel([weight / _linear_divisor(node) for weight in node.weights], fused=True)


def _blend_kernel(weights: Sequence[float], fused: bool) -> StoredKernel:
    left_weight, right_weight = (np.float32(weight) for weight in weights)

    def run(bits: list[np.ndarray], out: np.ndarray) -> bool:
        return kernels.blend_bf16(*bits, left_weight, right_weight, fused, out)

    return run


def _linear_divisor(node: Apply) -> float:
    return _sum_of_weights("linear", node.weights) if node.param("normalize", True) else 1.0


# Arcs


def _arc_fits(node: Apply) -> bool:
    return len(node.sources) == 2 and bool(node.param("flatten", True))


def _arc(blocks: Blocks, node: Apply, start: int) -> np.ndarray:
    left, right = (blocks.block(source, start) for source in node.sources)
    left_weight, right_weight = (np.float32(weight) for weight in blocks.arcs[id(node)])
    if node.base is None:
        kernels.blend_float32(left, right, left_weight, right_weight, False)
    else:
        base = blocks.block(node.base, start)
        kernels.blend_vectors(base, left, right, left_weight, right_weight)
        blocks.give(base)
    blocks.give(right)
    return left


def _prepare_arc(blocks: Blocks, node: Apply, threshold: float) -> None:
    """Find the weights of left and right on the arc between them; the plain weights where there is no arc."""
    sums = np.zeros(3)
    if stored := blocks.stored_bf16(node):
        for _, bits in blocks.stored_pass(stored):
            kernels.dots_bf16(*bits, sums)
    else:
        for start in blocks.starts():
            if node.base is None:
                left, right = (blocks.block(source, start) for source in node.sources)
            else:
                base, left, right = blocks.task_vectors(node, start)
                blocks.give(base)
            kernels.dots(left, right, sums)
            blocks.give(left, right)
    cosine = cosine_of(float(sums[0]), float(sums[1]), float(sums[2]))
    t = right_share(node.operator, node.weights)
    if is_straight(cosine, float(node.param("threshold", threshold))):
        blocks.notes.fell_back.add(node.step)
        blocks.arcs[id(node)] = (1.0 - t, t)
    else:
        blocks.arcs[id(node)] = interpolation_weights(cosine, t)


def _arc_kernel(blocks: Blocks, node: Apply) -> StoredKernel:
    return _blend_kernel(blocks.arcs[id(node)], fused=False)


# TIES


def _ties_fits(node: Apply) -> bool:
    return len(node.sources) == 2 and not node.param("rescale", False)


def _ties(blocks: Blocks, node: Apply, start: int) -> np.ndarray:
    trim = blocks.trims[id(node)]
    base, *vectors = trim.kept.pop(start, None) or blocks.task_vectors(node, start)
    for number, vector in enumerate(vectors):
        if not trim.counted:
            blocks.notes.bad_input |= kernels.not_finite(vector)
        kernels.trim_block(vector, trim.thresholds[number], trim.left[number : number + 1])
    left, right = vectors
    kernels.elect_float32(base, left, right, _election(node), bool(node.param("normalize", True)))
    blocks.give(base, right)
    return left


def _election(node: Apply) -> tuple[np.float32, ...]:
    """Weights of left and right, and the scale."""
    return *(np.float32(weight) for weight in node.weights), np.float32(node.param("scale", 1.0))


def _ties_kernel(blocks: Blocks, node: Apply) -> StoredKernel:
    trim, election, normalize = blocks.trims[id(node)], _election(node), bool(node.param("normalize", True))

    def run(bits: list[np.ndarray], out: np.ndarray) -> bool:
        if not trim.counted:
            blocks.notes.bad_input |= any(kernels.not_finite(values, bits[0]) for values in bits[1:])
        return kernels.ties_bf16(tuple(bits), trim.thresholds, trim.left, election, normalize, out)

    return run


def _prepare_ties(blocks: Blocks, node: Apply) -> None:
    blocks.trims[id(node)] = _trim(blocks, node)


def _trim(blocks: Blocks, node: Apply) -> Trim:
    num = blocks.output.num_elements
    if (thresholds := node.param("thresholds")) is not None:
        bits = np.array(thresholds, dtype=np.float32).view(np.uint32)
        return Trim(bits, np.array(node.param("budgets"), dtype=np.int64), False)
    assert node.param("trim_scope", "tensor") == "tensor", "see global_trims.resolve_global_trims"
    keep = [kept_count(density, num) for density in densities(node)]
    if all(count == num for count in keep):
        return Trim(np.zeros(len(keep), dtype=np.uint32), np.full(len(keep), num), False)
    kept: dict[int, tuple[np.ndarray, ...]] | None = {} if num <= _KEPT_VECTORS else None
    high, low = (np.zeros((len(keep), num_bins), dtype=np.int64) for num_bins in (NUM_HIGH, NUM_LOW))
    count_magnitudes(blocks, node, high, None, kept)
    blocks.notes.bad_input |= bool(high[:, NOT_FINITE:].any())
    tops = top_bins(high, keep)
    count_magnitudes(blocks, node, low, tops, kept)
    return Trim(*exact_thresholds(tops, low, keep), True, kept or {})


def count_magnitudes(
    blocks: Blocks, node: Apply, counts: np.ndarray, tops: Tops | None, kept: dict[int, Any] | None = None
) -> None:
    """Add the magnitudes of task vectors to (num_sources, 32768) by upper bits, or (num_sources, 65536) below `tops`.

    kept: the blocks of a small tensor are put there, and taken from there the second time.
    """
    if stored := blocks.stored_bf16(node):
        for _, (base, *others) in blocks.stored_pass(stored):
            count_vectors(others, counts, tops, base)
        return
    for start in blocks.starts():
        vectors = (kept or {}).get(start) or blocks.task_vectors(node, start)
        count_vectors(vectors[1:], counts, tops)
        if kept is None:
            blocks.give(*vectors)
        else:
            kept[start] = vectors


def count_vectors(
    vectors: Sequence[np.ndarray], counts: np.ndarray, tops: Tops | None, base: np.ndarray | None = None
) -> None:
    """`count_magnitudes` of given task vectors; with a base, of sources as bfloat16 bits."""
    for number, vector in enumerate(vectors):
        if tops is None:
            kernels.count_high(vector, counts[number], base)
        else:
            kernels.count_low(vector, np.uint32(tops[number][0]), counts[number], base)


FORMS: Mapping[str, BlockForm] = {
    "passthrough": BlockForm(_passthrough),
    "linear": BlockForm(_linear, stored_inputs=_linear_stored, stored_kernel=_linear_kernel),
    "task_arithmetic": BlockForm(_task_arithmetic, lambda node: not node.param("normalize", False)),
    "slerp": BlockForm(
        _arc,
        _arc_fits,
        partial(_prepare_arc, threshold=SLERP_THRESHOLD),
        stored_inputs=lambda node: node.sources,
        stored_kernel=_arc_kernel,
    ),
    "nuslerp": BlockForm(_arc, _arc_fits, partial(_prepare_arc, threshold=1.0)),
    "ties": BlockForm(_ties, _ties_fits, _prepare_ties, lambda n: n.inputs, _ties_kernel),
}


def is_blockwise(output: OutputTensor, specs: Mapping[str, Mapping[str, TensorSpec]]) -> bool:
    """Whether a tensor is made block by block; `specs` holds the headers of every checkpoint."""

    def fits(node: Node) -> bool:
        if isinstance(node, Read):
            return specs[node.checkpoint][node.tensor].dtype in _BLOCKWISE_DTYPES
        if isinstance(node, Rows):
            return all(fits(source) for source in node.sources)
        form = FORMS.get(node.operator)
        if form is None or (OPERATOR_SPECS[node.operator].needs_base and node.base is None):
            return False  # without its base: the operator says what is missing
        plain = all(isinstance(value, int | float | str) for key, value in node.params if key not in _PER_SOURCE)
        return plain and form.fits(node) and all(fits(inner) for inner in node.inputs)

    # float64 is computed in float64, as a whole
    return output.dtype not in FLOAT_DTYPES or (output.input_dtype != "F64" and fits(output.node))


def _gram_bytes(node: Node, specs: Mapping[str, Mapping[str, TensorSpec]]) -> int:
    """What solving for a tensor takes: its Gram matrices, and float64 ones of their sum and its factor."""
    sizes = [specs[gram.checkpoint][gram.tensor].num_bytes for one in applies(node) for gram in one.grams]
    return sum(sizes) + 10 * max(sizes, default=0)


def memory_per_thread(graph: MergeGraph, specs: Mapping[str, Mapping[str, TensorSpec]]) -> int:
    """Upper bound of the bytes that one thread holds: blocks, or the float32 copies of its largest whole tensor."""
    widest = max((len(list(reads(output.node))) for output in graph.outputs), default=1)
    stored = kernels.PAIR_BLOCK * 2 + 6 * max(KEPT_ELEMENTS, kernels.PAIR_BLOCK)
    blocks = kernels.BLOCK * (16 + 4 * (widest + 2)) + stored + 12 * _KEPT_VECTORS + (3 << 19)
    whole = [
        output.num_elements * 4 * (2 * len(list(reads(output.node))) + 2) + _gram_bytes(output.node, specs)
        for output in graph.outputs
        if not is_blockwise(output, specs)
    ]
    return blocks + max(whole, default=0)
