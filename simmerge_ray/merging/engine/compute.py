"""One tensor of a merge: block by block where the operators allow it, as a whole by the torch operators elsewhere.

Block by block means passes over the inputs: first one or two for what an operator must know of the whole tensor (the
angle of SLERP, the thresholds of TIES), innermost steps first, then the pass that makes the result. Memory is a few
blocks, whatever the size of the tensor and the length of the plan.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.checkpoints.digests import checkpoint_digest
from simmerge_ray.checkpoints.headers import TensorSpec
from simmerge_ray.merging.engine import kernels
from simmerge_ray.merging.engine.raw_blocks import KEPT_ELEMENTS, RawBlocks
from simmerge_ray.merging.engine.sources import NUMPY_DTYPES, TensorSource
from simmerge_ray.merging.engine.trims import (
    NOT_FINITE,
    Tops,
    Trim,
    densities,
    exact_thresholds,
    high_counts,
    low_counts,
    top_bins,
)
from simmerge_ray.merging.graph import FLOAT_DTYPES, Apply, MergeGraph, Node, OutputTensor, Read, reads
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

if TYPE_CHECKING:
    from torch import Tensor

_BLOCKWISE_DTYPES = ("F32", "BF16", "F16")
_PER_SOURCE = ("density", "thresholds", "budgets")
_KEPT_VECTORS = 1 << 20  # base and two task vectors of so many entries are 12 MB
Emit = Callable[[int, np.ndarray], None]


@dataclass
class TensorReport:
    """What was noticed while a tensor was made.

    not_finite: the result or an input holds NaN or infinity. fell_back: numbers of the steps (from 1) whose SLERP was
    linear.
    """

    name: str
    not_finite: bool = False
    fell_back: tuple[int, ...] = ()


class Computer:
    """Computes tensors of one graph; one object a thread (the sources may be shared)."""

    def __init__(self, graph: MergeGraph, sources: Mapping[str, TensorSource], seeds: Seeds) -> None:
        self._graph = graph
        self._sources = sources
        self._seeds = seeds
        self._raw = np.empty(kernels.BLOCK * 8, dtype=np.uint8)
        self._out = np.empty(kernels.BLOCK * 8, dtype=np.uint8)
        self._raw_blocks = RawBlocks(sources)
        self._raw_out = np.empty(kernels.PAIR_BLOCK, dtype=np.uint16)
        self._free: list[np.ndarray] = []
        self._angles: dict[int, tuple[float, float]] = {}
        self._trims: dict[int, Trim] = {}
        self._output: OutputTensor | None = None
        self._fell_back: list[int] = []
        self._bad_input = False  # where the operator may drop it from the result

    def compute(self, output: OutputTensor, emit: Emit) -> TensorReport:
        """Make one tensor; `emit(element offset, flat block in the output's dtype)` takes its parts in order.

        Raises:
            CheckpointError: an input cannot be read, or integer tensors differ. OperatorError: see the operator.
        """
        self._restart(output)
        if output.dtype not in FLOAT_DTYPES:
            self._copy_equal(output, emit)
            return TensorReport(output.name)
        if not self._is_blockwise(output):
            return self._compute_whole(output, emit)
        self._prepare(output.node)
        not_finite = False
        if (stored := self._stored_bf16(output.node)) and output.dtype == "BF16":
            not_finite = self._emit_bf16(output, stored, emit)
            return TensorReport(output.name, not_finite or self._bad_input, tuple(sorted(self._fell_back)))
        for start, values in self._blocks(output.node):
            not_finite |= self._emit_float32(values, output.dtype, start, emit)
        return TensorReport(output.name, not_finite or self._bad_input, tuple(sorted(self._fell_back)))

    def fallbacks(self, output: OutputTensor) -> tuple[int, ...]:
        """Numbers of the steps whose SLERP is linear on this tensor, without making it."""
        self._restart(output)
        if output.dtype in FLOAT_DTYPES and self._is_blockwise(output):
            self._prepare(output.node)
        return tuple(sorted(self._fell_back))

    def count_magnitudes(self, output: OutputTensor, node: Apply, counts: np.ndarray, tops: Tops | None) -> None:
        """Add the magnitudes of the task vectors of a TIES step, one of those that make a tensor, to `counts`.

        Args:
            counts: (num_sources, 32768) by the upper bits, or, where `tops` are given, (num_sources, 65536) by the
                lower bits of those whose upper bits are in `tops`.
        """
        self._restart(output)
        if self._is_blockwise(output):
            for source in (*node.sources, *((node.base,) if node.base is not None else ())):
                self._prepare(source)
            self._count(node, counts, tops, None)
            return
        from simmerge_ray.plans.operators.task_vectors import task_vectors

        base = self._whole(node.base, output) if node.base is not None else None
        tensors = [self._whole(source, output) for source in node.sources]
        _, vectors = task_vectors(node.operator, base, tensors, node.weights)
        _count_vectors([vector.reshape(-1).numpy() for vector in vectors], counts, tops)

    def _restart(self, output: OutputTensor) -> None:
        self._output = output
        self._angles, self._trims, self._fell_back = {}, {}, []
        self._bad_input = False
        self._raw_blocks.forget()

    # Block by block

    def _is_blockwise(self, output: OutputTensor) -> bool:
        return is_blockwise(output, {key: source.specs for key, source in self._sources.items()})

    def _blocks(self, node: Node) -> Iterator[tuple[int, np.ndarray]]:
        """(offset, float32 values) of a prepared node, valid until the next block."""
        for start in self._starts():
            values = self._block(node, start)
            yield start, values
            self._give(values)

    def _starts(self) -> range:
        assert self._output is not None
        for trim in self._trims.values():
            trim.restart()
        return range(0, self._output.num_elements, kernels.BLOCK)

    def _take(self) -> np.ndarray:
        return self._free.pop() if self._free else np.empty(kernels.BLOCK, dtype=np.float32)

    def _give(self, *blocks: np.ndarray) -> None:
        self._free.extend(block.base if block.base is not None else block for block in blocks)

    def _block(self, node: Node, start: int) -> np.ndarray:
        assert self._output is not None
        stop = min(start + kernels.BLOCK, self._output.num_elements)
        if isinstance(node, Read):
            source = self._sources[node.checkpoint]
            values = source.read_float32(node.tensor, start, stop, self._raw, self._take())
            self._round(values, self._output.input_dtype)
            return values
        values = self._apply(node, start)
        self._round(values, node.round_to)
        return values

    def _apply(self, node: Apply, start: int) -> np.ndarray:
        params = dict(node.params)
        scale = _number(params.get("scale", 1.0))
        if node.operator == "ties":
            return self._ties(node, start, scale)
        first = self._block(node.sources[0], start)
        if node.operator == "passthrough":
            if scale != 1.0:
                first *= np.float32(scale)
            return first
        base = self._block(node.base, start) if node.base is not None else None
        if node.operator == "linear":
            self._sum(first, node.sources[1:], list(node.weights), start)
            if (divisor := _linear_divisor(node)) != 1.0:
                first /= np.float32(divisor)
        elif node.operator == "task_arithmetic":
            assert base is not None
            kernels.subtract(first, base)
            self._sum(first, node.sources[1:], list(node.weights), start, base)
            if scale != 1.0:
                first *= np.float32(scale)
            first += base
        else:
            right = self._block(node.sources[1], start)
            weights_of_angle = tuple(np.float32(weight) for weight in self._angles[id(node)])
            if base is None:
                kernels.blend(first, right, *weights_of_angle, False)
            else:
                kernels.blend_vectors(base, first, right, *weights_of_angle)
            self._give(right)
        if base is not None:
            self._give(base)
        return first

    def _sum(
        self, first: np.ndarray, rest: tuple[Node, ...], weights: list[float], start: int, base: Any = None
    ) -> None:
        if not rest:
            first *= np.float32(weights[0])
        for number, source in enumerate(rest, 1):
            values = self._block(source, start)
            if base is not None:
                kernels.subtract(values, base)
            kernels.blend(
                first, values, np.float32(weights[0] if number == 1 else 1.0), np.float32(weights[number]), base is None
            )
            self._give(values)

    def _ties(self, node: Apply, start: int, scale: float) -> np.ndarray:
        trim = self._trims[id(node)]
        base, *vectors = trim.kept.pop(start, None) or self._task_vectors(node, start)
        for number, vector in enumerate(vectors):
            if not trim.counted:
                self._bad_input |= kernels.not_finite(vector)
            kernels.trim_block(vector, trim.thresholds[number], trim.left[number : number + 1])
        left, right = vectors
        normalize = bool(dict(node.params).get("normalize", True))
        weights = (np.float32(node.weights[0]), np.float32(node.weights[1]))
        kernels.elect(base, left, right, *weights, np.float32(scale), normalize)
        self._give(base, right)
        return left

    def _task_vectors(self, node: Apply, start: int) -> tuple[np.ndarray, ...]:
        """(base, source - base, ...) of a block."""
        assert node.base is not None
        base, *vectors = (self._block(source, start) for source in (node.base, *node.sources))
        for vector in vectors:
            kernels.subtract(vector, base)
        return base, *vectors

    # What operators must know of the whole tensor

    def _stored_bf16(self, node: Node) -> tuple[Read, ...]:
        """The two tensors of a weighted sum, or base and two tensors of TIES, if all are stored as bfloat16.

        The cases that deserve loops of their own; empty for any other.
        """
        assert self._output is not None
        if not isinstance(node, Apply) or node.operator not in ("linear", "slerp", "ties") or len(node.sources) != 2:
            return ()
        if node.operator == "linear" and math.frexp(_linear_divisor(node))[0] != 0.5:
            return ()  # only a division by a power of two may be done before the sum
        inputs = (node.base, *node.sources) if node.operator == "ties" else node.sources
        stored = tuple(one for one in inputs if isinstance(one, Read) and self._is_stored_bf16(one))
        return stored if len(stored) == len(inputs) and self._output.input_dtype in (None, "BF16") else ()

    def _is_stored_bf16(self, read: Read) -> bool:
        source = self._sources[read.checkpoint]
        return source.specs[read.tensor].dtype == "BF16" and not source.is_adapted(read.tensor)

    def _raw_pass(self, stored: tuple[Read, ...]) -> Iterator[tuple[int, list[np.ndarray]]]:
        assert self._output is not None
        for trim in self._trims.values():
            trim.restart()
        return self._raw_blocks.blocks(stored, self._output.num_elements)

    def _emit_bf16(self, output: OutputTensor, stored: tuple[Read, ...], emit: Emit) -> bool:
        node = output.node
        assert isinstance(node, Apply)
        not_finite = False
        if node.operator == "ties":
            trim, params = self._trims[id(node)], dict(node.params)
            scale, normalize = np.float32(_number(params.get("scale", 1.0))), bool(params.get("normalize", True))
            left_weight, right_weight = (np.float32(weight) for weight in node.weights)
            for start, bits in self._raw_pass(stored):
                out = self._raw_out[: bits[0].size]
                if not trim.counted:
                    self._bad_input |= any(kernels.not_finite_bf16(bits[0], values) for values in bits[1:])
                not_finite |= kernels.ties_bf16(
                    *bits, trim.thresholds, trim.left, left_weight, right_weight, scale, normalize, out
                )
                emit(start, out)
            return not_finite
        linear = node.operator == "linear"
        weights = [w / _linear_divisor(node) for w in node.weights] if linear else list(self._angles[id(node)])
        left_weight, right_weight = (np.float32(weight) for weight in weights)
        for start, (left, right) in self._raw_pass(stored):
            out = self._raw_out[: left.size]
            not_finite |= kernels.blend_bf16(left, right, left_weight, right_weight, linear, out)
            emit(start, out)
        return not_finite

    def _prepare(self, node: Node) -> None:
        if isinstance(node, Read):
            return
        for source in (*node.sources, *((node.base,) if node.base is not None else ())):
            self._prepare(source)
        if node.operator in ("slerp", "nuslerp"):
            self._angles[id(node)] = self._interpolation(node)
        elif node.operator == "ties":
            self._trims[id(node)] = self._thresholds(node)

    def _vectors(self, node: Apply, start: int) -> tuple[np.ndarray, np.ndarray]:
        left, right = (self._block(source, start) for source in node.sources)
        if node.base is not None:
            base = self._block(node.base, start)
            kernels.subtract(left, base)
            kernels.subtract(right, base)
            self._give(base)
        return left, right

    def _interpolation(self, node: Apply) -> tuple[float, float]:
        """Weights of left and right on the arc between them; the plain weights where there is no arc."""
        sums = np.zeros(3)
        if stored := self._stored_bf16(node):
            for _, bits in self._raw_pass(stored):
                kernels.dots_bf16(*bits, sums)
        else:
            for start in self._starts():
                left, right = self._vectors(node, start)
                kernels.dots(left, right, sums)
                self._give(left, right)
        cosine = cosine_of(float(sums[0]), float(sums[1]), float(sums[2]))
        t = right_share(node.operator, node.weights)
        threshold = _number(dict(node.params).get("threshold", SLERP_THRESHOLD)) if node.operator == "slerp" else 1.0
        if is_straight(cosine, threshold):
            self._fell_back.append(node.step)
            return 1.0 - t, t
        return interpolation_weights(cosine, t)

    def _thresholds(self, node: Apply) -> Trim:
        assert self._output is not None
        params, num = dict(node.params), self._output.num_elements
        if "thresholds" in params:
            thresholds, budgets = (params[name] for name in ("thresholds", "budgets"))
            return Trim(
                np.array(thresholds, dtype=np.float32).view(np.uint32), np.array(budgets, dtype=np.int64), False
            )
        assert params.get("trim_scope", "tensor") == "tensor", "see global_trims.resolve_global_trims"
        keep = [kept_count(density, num) for density in densities(node)]
        if all(count == num for count in keep):
            return Trim(np.zeros(len(keep), dtype=np.uint32), np.full(len(keep), num), False)
        kept: dict[int, tuple[np.ndarray, ...]] = {}
        high, low = high_counts(len(keep)), low_counts(len(keep))
        self._count(node, high, None, kept)
        self._bad_input |= bool(high[:, NOT_FINITE:].any())
        tops = top_bins(high, keep)
        self._count(node, low, tops, kept)
        return Trim(*exact_thresholds(tops, low, keep), True, kept)

    def _count(self, node: Apply, counts: np.ndarray, tops: Tops | None, kept: dict[int, Any] | None) -> None:
        """Add the magnitudes of the task vectors to (num_sources, bins): by their upper bits, or below `tops`.

        kept: the blocks of a small tensor are put there, and taken from there the second time.
        """
        if stored := self._stored_bf16(node):
            for _, (base, *others) in self._raw_pass(stored):
                for number, values in enumerate(others):
                    if tops is None:
                        kernels.count_high_bf16(base, values, counts[number])
                    else:
                        kernels.count_low_bf16(base, values, np.uint32(tops[number][0]), counts[number])
            return
        assert self._output is not None
        is_small = kept is not None and self._output.num_elements <= _KEPT_VECTORS
        for start in self._starts():
            blocks = (kept or {}).get(start) or self._task_vectors(node, start)
            _count_vectors(blocks[1:], counts, tops)
            if is_small and kept is not None:
                kept[start] = blocks
            else:
                self._give(*blocks)

    # Results

    def _round(self, values: np.ndarray, dtype: str | None) -> None:
        """Round in place to a narrower dtype."""
        if dtype == "BF16":
            bits = self._out[: values.size * 2].view(np.uint16)
            kernels.narrow_bf16(values, bits)
            kernels.widen_bf16(bits, values)
        elif dtype == "F16":
            values[:] = values.astype(np.float16)

    def _emit_float32(self, values: np.ndarray, dtype: str, start: int, emit: Emit) -> bool:
        if dtype == "BF16":
            bits = self._out[: values.size * 2].view(np.uint16)
            not_finite = kernels.narrow_bf16(values, bits)
            emit(start, bits)
            return bool(not_finite)
        block = values if dtype == "F32" else _cast(values, dtype)
        emit(start, block)
        return not bool(np.isfinite(block).all()) if dtype == "F16" else bool(kernels.not_finite(values))

    def _copy_equal(self, output: OutputTensor, emit: Emit) -> None:
        first, *others = dict.fromkeys(reads(output.node))
        for start in range(0, output.num_elements, kernels.BLOCK):
            stop = min(start + kernels.BLOCK, output.num_elements)
            block = self._sources[first.checkpoint].read_raw(first.tensor, start, stop, self._raw)
            for other in others:
                theirs = self._sources[other.checkpoint].read_raw(other.tensor, start, stop, self._out)
                if not np.array_equal(block, theirs):
                    raise CheckpointError(
                        f"integer tensor {output.name} differs between {first.checkpoint!r} and {other.checkpoint!r}"
                    )
            emit(start, block)

    # Whole tensors

    def _compute_whole(self, output: OutputTensor, emit: Emit) -> TensorReport:
        import torch

        result = self._whole(output.node, output).to(_torch_dtype(output.dtype)).contiguous()
        not_finite = self._bad_input or not bool(torch.isfinite(result).all())
        flat = result.reshape(-1)
        array = (flat.view(torch.int16) if output.dtype == "BF16" else flat).numpy().view(NUMPY_DTYPES[output.dtype])
        for start in range(0, output.num_elements, kernels.BLOCK):
            emit(start, array[start : start + kernels.BLOCK])
        return TensorReport(output.name, not_finite, tuple(sorted(self._fell_back)))

    def _whole(self, node: Node, output: OutputTensor) -> Tensor:
        import torch

        from simmerge_ray.plans.operators.table import OPERATORS, fell_back

        if isinstance(node, Read):
            tensor = self._read_tensor(node)
            self._bad_input |= not bool(torch.isfinite(tensor).all())
            return tensor.to(_torch_dtype(output.input_dtype)) if output.input_dtype else tensor
        base = self._whole(node.base, output) if node.base is not None else None
        tensors = [self._whole(source, output) for source in node.sources]
        params: dict[str, Any] = dict(node.params)
        if fell_back(node.operator, base, tensors, **params):
            self._fell_back.append(node.step)
        if OPERATOR_SPECS[node.operator].random:
            params["seeds"] = [self._seeds.of(source, node.step, output.name) for source in node.sources]
        result: torch.Tensor = OPERATORS[node.operator](base, tensors, list(node.weights), **params)
        if node.round_to:
            result = result.to(_torch_dtype(node.round_to)).to(result.dtype)
        return result

    def _read_tensor(self, node: Read) -> Tensor:
        import torch

        source = self._sources[node.checkpoint]
        spec = source.specs[node.tensor]
        array = source.read_whole(node.tensor)
        bits = spec.dtype == "BF16" and array.dtype == np.uint16
        flat = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if bits else torch.from_numpy(array)
        return flat.reshape(spec.shape)


def is_blockwise(output: OutputTensor, specs: Mapping[str, Mapping[str, TensorSpec]]) -> bool:
    """Whether a tensor is made block by block; `specs` holds the headers of every checkpoint."""

    def fits(node: Node) -> bool:
        if isinstance(node, Read):
            return specs[node.checkpoint][node.tensor].dtype in _BLOCKWISE_DTYPES
        params = dict(node.params)
        plain = all(isinstance(value, int | float | str) for key, value in node.params if key not in _PER_SOURCE)
        operator_fits = {
            "linear": plain,
            "passthrough": plain,
            "task_arithmetic": plain and not params.get("normalize", False),
            "slerp": len(node.sources) == 2,
            "nuslerp": len(node.sources) == 2 and params.get("flatten", True),
            "ties": len(node.sources) == 2 and plain,
        }.get(node.operator, False)
        inner = (*node.sources, *((node.base,) if node.base is not None else ()))
        if OPERATOR_SPECS[node.operator].needs_base and node.base is None:
            return False  # the operator says what is missing
        return bool(operator_fits) and all(fits(source) for source in inner)

    # float64 is computed in float64, as a whole
    return output.dtype not in FLOAT_DTYPES or (output.input_dtype != "F64" and fits(output.node))


def memory_per_thread(graph: MergeGraph, specs: Mapping[str, Mapping[str, TensorSpec]]) -> int:
    """Upper bound of the bytes that one thread holds: blocks, or the float32 copies of its largest whole tensor."""
    widest = max((len(list(reads(output.node))) for output in graph.outputs), default=1)
    stored = kernels.PAIR_BLOCK * 2 + 6 * max(KEPT_ELEMENTS, kernels.PAIR_BLOCK)
    blocks = kernels.BLOCK * (16 + 4 * (widest + 2)) + stored + 12 * _KEPT_VECTORS + (3 << 19)
    whole = [
        output.num_elements * 4 * (2 * len(list(reads(output.node))) + 2)
        for output in graph.outputs
        if not is_blockwise(output, specs)
    ]
    return blocks + max(whole, default=0)


class Seeds:
    """Seeds of random operators: a hash of (seed of the plan, step, digest of the input checkpoint, tensor name).

    Inputs get independent masks, and the result does not depend on the order or machine on which tensors are merged.
    """

    def __init__(self, graph: MergeGraph) -> None:
        self._graph = graph
        self._digests: dict[str, str] = {}
        self._lock = threading.Lock()  # every byte of a checkpoint is read once, not by every thread

    def of(self, source: Node, step: int, tensor: str) -> int:
        checkpoints = sorted({read.checkpoint for read in reads(source)})
        digests = [self._digest(checkpoint) for checkpoint in checkpoints]
        text = "\0".join([str(self._graph.seed), str(step), *digests, tensor])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def _digest(self, checkpoint: str) -> str:
        with self._lock:
            if checkpoint not in self._digests:
                self._digests[checkpoint] = checkpoint_digest(self._graph.checkpoints[checkpoint])
            return self._digests[checkpoint]


def _count_vectors(vectors: Sequence[np.ndarray], counts: np.ndarray, tops: Tops | None) -> None:
    for number, vector in enumerate(vectors):
        if tops is None:
            kernels.count_high(vector, counts[number])
        else:
            kernels.count_low(vector, np.uint32(tops[number][0]), counts[number])


def _linear_divisor(node: Apply) -> float:
    return _sum_of_linear(node.weights) if dict(node.params).get("normalize", True) else 1.0


@lru_cache
def _sum_of_linear(weights: tuple[float, ...]) -> float:
    return sum_of_weights("linear", weights)


def _number(value: Any) -> float:
    return float(value[0] if isinstance(value, tuple) else value)


def _cast(values: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows becomes infinity and is reported
        return values.astype(NUMPY_DTYPES[dtype])


def _torch_dtype(name: str) -> Any:
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
