"""Reading weights for signals, block by block: the sample that a signature keeps, and the sums over all checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager

import numpy as np

from simmerge_ray.checkpoints.headers import TensorSpec
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.engine import kernels
from simmerge_ray.merging.engine.sources import TensorSource
from simmerge_ray.merging.graph import FLOAT_DTYPES
from simmerge_ray.plans.operators.shares import kept_count
from simmerge_ray.signals.signature import DENSITIES, TensorSample, Weights, coordinates
from simmerge_ray.signals.weights import BLOCK_ELEMENTS, TRIM_DENSITY, WeightSums, sums_in_blocks


class TensorBlocks:
    """Blocks of float32 elements of one checkpoint, checked to be finite."""

    def __init__(self, ref: CheckpointRef, block: int = BLOCK_ELEMENTS) -> None:
        self.ref = ref
        self.source = TensorSource(ref)
        self._raw = np.empty(8 * block, dtype=np.uint8)

    def read(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Elements [start, stop) of a tensor. Raises CheckpointError: they cannot be read, or hold NaN or infinity."""
        room = np.empty(stop - start, dtype=np.float32) if out is None else out
        values = self.source.read_float32(name, start, stop, self._raw, room)
        if kernels.not_finite(values):
            raise self.ref.error(f"tensor {name} holds NaN or infinity")
        return values

    def num_elements(self, name: str) -> int:
        return math.prod(self.source.specs[name].shape)

    def close(self) -> None:
        self.source.close()


@contextmanager
def opened_blocks(refs: Iterable[CheckpointRef], block: int = BLOCK_ELEMENTS) -> Iterator[dict[str, TensorBlocks]]:
    """The blocks of checkpoints by id, closed afterwards."""
    with ExitStack() as stack:
        yield {ref.id: stack.enter_context(closing(TensorBlocks(ref, block))) for ref in refs}


def float_tensors_of(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Names of the tensors that signals are computed of; integer and bool buffers are not."""
    return [name for name, spec in specs.items() if spec.dtype in FLOAT_DTYPES]


def tensor_sample(name: str, tensors: TensorBlocks, base: TensorBlocks | None, count: int) -> TensorSample:
    """Sample `count` coordinates of one tensor of a checkpoint.

    base: the common base; the checkpoint itself where it is the base; None without one.
    """
    size = tensors.num_elements(name)
    index = coordinates(name, size, count)
    values = np.empty(len(index), dtype=np.float32)
    sums = np.zeros(3)
    counts = np.zeros(1 << 15, dtype=np.int64)
    for start, stop, block, centre in _blocks(name, size, tensors, base):
        first, last = np.searchsorted(index, (start, stop))
        values[first:last] = block[index[first:last] - start]
        if centre is None:
            doubled = block.astype(np.float64)
            sums[0 if base else 2] += doubled @ doubled
        else:
            kernels.subtract(block, centre)
            kernels.dots(centre, block, sums)
            kernels.count_high(block, counts)
    if base is None or base is tensors:
        return TensorSample(size, values, sums, np.full(len(DENSITIES), np.nan, dtype=np.float32))
    keep = [kept_count(density, size) for density in DENSITIES]
    tops = [kernels.bin_of(counts, number) for number in keep]
    low = np.zeros((len(keep), (1 << 16) + 64), dtype=np.int64)
    for _, _, block, centre in _blocks(name, size, tensors, base):
        kernels.subtract(block, centre)
        for number, (top, _) in enumerate(tops):
            kernels.count_low(block, np.uint32(top), low[number])
    bits = [
        (top << 16) | kernels.bin_of(low[number, : 1 << 16], keep[number] - above)[0]
        for number, (top, above) in enumerate(tops)
    ]
    return TensorSample(size, values, sums, np.array(bits, dtype=np.uint32).view(np.float32))


def _blocks(
    name: str, size: int, tensors: TensorBlocks, base: TensorBlocks | None
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray | None]]:
    for start in range(0, size, BLOCK_ELEMENTS):
        stop = min(start + BLOCK_ELEMENTS, size)
        centre = base.read(name, start, stop) if base is not None and base is not tensors else None
        yield start, stop, tensors.read(name, start, stop), centre


def exact_sums(
    name: str, checkpoints: Sequence[TensorBlocks], base: TensorBlocks | None, thresholds: np.ndarray, block: int
) -> WeightSums:
    """Sums over one tensor of all checkpoints, centred on the base or, without one, on the mean of the checkpoints.

    thresholds: (M,) float32, what trimming keeps of each task vector at `TRIM_DENSITY`.
    """
    if len(thresholds) != len(checkpoints):  # compiled loops read past the end of what is too short
        raise ValueError(
            f"tensor {name}: {len(checkpoints)} checkpoints need as many thresholds, got {len(thresholds)}"
        )
    size = checkpoints[0].num_elements(name)
    room = np.empty((len(checkpoints) + 1, min(block, size)), dtype=np.float32)

    def read(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        rows = room[1:, : stop - start]
        for tensors, row in zip(checkpoints, rows, strict=True):
            tensors.read(name, start, stop, row)
        if base is None:
            centre = rows.mean(0, dtype=np.float64).astype(np.float32)
        else:
            centre = base.read(name, start, stop, room[0, : stop - start])
        rows -= centre
        return rows, centre

    return sums_in_blocks(read, size, thresholds, block)


def sampled_sums(samples: Sequence[TensorSample], base: TensorSample | None) -> WeightSums:
    """The same sums for one tensor from signatures: a sample scaled to the whole, with the exact norms."""
    rows = np.stack([sample.values for sample in samples])
    centre = rows.mean(0, dtype=np.float64).astype(np.float32) if base is None else base.values
    sums = sums_in_blocks(
        lambda a, b: (rows[:, a:b] - centre[a:b], centre[a:b]), len(centre), trim_thresholds(samples)
    ).scaled(samples[0].scale)
    if base is None or len(centre) == samples[0].num_elements:
        return sums
    exact = [(base.sums[0], base.sums[0]), *((sample.sums[1], sample.sums[2]) for sample in samples)]
    return sums.with_norms(np.array(exact))


def trim_threshold(sample: TensorSample) -> float:
    """Smallest magnitude of the task vector that trimming to `TRIM_DENSITY` keeps; infinite without a base."""
    found = float(sample.thresholds[DENSITIES.index(TRIM_DENSITY)])
    return math.inf if math.isnan(found) else found


def trim_thresholds(samples: Sequence[TensorSample]) -> np.ndarray:
    """(M,) float32 of the samples of one tensor."""
    return np.array([trim_threshold(sample) for sample in samples], dtype=np.float32)


def sampled_weight_sums(weights: Sequence[Weights], base: Weights | None) -> dict[str, WeightSums]:
    """`sampled_sums` of every tensor, by name."""
    return {
        name: sampled_sums([one[name] for one in weights], None if base is None else base[name])
        for name in sorted(weights[0])
    }
