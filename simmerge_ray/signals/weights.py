"""Weight signals of all pairs from sums that add: over blocks, tensors and shards.

Everything is centred on the base where there is one, so that the distance of close fine-tunes keeps full precision, and
the raw cosine is recovered from `<w_i, w_j> = <c, c> + <c, d_i> + <c, d_j> + <d_i, d_j>`. Differences are float32,
products and sums float64.

Two ways to the same sums: *exact* reads every tensor of every checkpoint once, *sampled* takes the fixed sample of
coordinates that signatures hold, scaled by n/S, with the exact norms; the absolute error of a cosine is then about
`1 / sqrt(S)` for a tensor of more than S elements.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from simmerge_ray.checkpoints.kinds import TENSOR_KINDS, tensor_kind
from simmerge_ray.signals.features import layer_thirds

BLOCK_ELEMENTS = 1 << 16
TRIM_DENSITY = 0.2  # of `trimmed_overlap`
NORM_FLOOR = 1e-6  # of the centre's norm: task vectors below count as not moved in the log ratio
_TINY = float(np.finfo(np.float64).tiny)


def tensor_layer(name: str) -> int | None:
    """Index of the decoder layer that a tensor belongs to, from its name; None for embeddings and final norms."""
    found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.|^h\.(\d+)\.", name)
    return int(found[1] or found[2]) if found else None


@dataclass(frozen=True)
class WeightSums:
    """Sums over coordinates for M vectors `d_i = w_i - c` from a centre c; `+` adds coordinates. All float64.

    gram: (M + 1, M + 1), inner products of [c, d_1, ..., d_M]. sign_product: (M, M), sum of sign(d_i) sign(d_j).
    sign_support: (M, M), coordinates where both are non-zero. overlap: (M, M), coordinates that trimming keeps of both.
    """

    gram: np.ndarray
    sign_product: np.ndarray
    sign_support: np.ndarray
    overlap: np.ndarray

    @staticmethod
    def zero(num_vectors: int) -> WeightSums:
        size = (num_vectors, num_vectors)
        return WeightSums(np.zeros((num_vectors + 1, num_vectors + 1)), np.zeros(size), np.zeros(size), np.zeros(size))

    def __add__(self, other: WeightSums) -> WeightSums:
        return WeightSums(
            *(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def scaled(self, factor: float) -> WeightSums:
        """Sums of a sample, scaled to the whole."""
        return WeightSums(*(one * factor for one in vars(self).values()))

    def with_norms(self, exact: np.ndarray) -> WeightSums:
        """Inner products of a sample with the exact ones in row and column 0 and on the diagonal.

        Products of two vectors keep the *cosine* of the sample.

        Args:
            exact: (M + 1, 2) float64, `<c, x>` and `<x, x>` of each x in [c, d_1, ..., d_M].
        """
        sampled = np.sqrt(np.maximum(np.diagonal(self.gram), 0.0))
        true = np.sqrt(np.maximum(exact[:, 1], 0.0))
        ratio = np.divide(true, sampled, out=np.zeros_like(true), where=sampled > 0)
        gram = self.gram * ratio[:, None] * ratio[None, :]
        np.fill_diagonal(gram, exact[:, 1])
        gram[0, :], gram[:, 0] = exact[:, 0], exact[:, 0]
        return WeightSums(gram, self.sign_product, self.sign_support, self.overlap)

    def signals(self, with_base: bool) -> dict[str, np.ndarray]:
        """Signals from the sums, each (M, M) float64.

        `cosine` and `l2` (over the norm of the centre) always; with a base as the centre also `task_vector_cosine`,
        `task_vector_norm_ratio` (log of left over right), `sign_conflict` (share of the coordinates moved by both that
        are moved in opposite directions; 0 where there is none), `trimmed_overlap` (coordinates kept of both over the
        geometric mean of those kept of each) and `task_vector_norm` (of checkpoint i in row i, relative).
        A zero vector has cosine 0 with all. The log ratio takes norms as at least 1e-6 of the centre's: a LoRA leaves
        whole tensors as they are, and the logarithm of zero would drown every other value.
        """
        gram, kept = self.gram[1:, 1:], np.diagonal(self.overlap)
        one = VectorSums(self.gram[0, 1:], np.diagonal(gram), kept)
        sides = VectorSums(*(values[:, None] for values in vars(one).values())), one
        shared = gram, self.sign_product, self.sign_support, self.overlap
        signals = related(self.gram[0, 0], *sides, shared, with_base)
        np.fill_diagonal(signals["l2"], 0.0)
        if with_base:
            norms = one.relative_norms(self.gram[0, 0])
            signals["task_vector_norm"] = np.repeat(norms[:, None], len(norms), axis=1)
        return signals


@dataclass(frozen=True)
class VectorSums:
    """Sums of single vectors, of one shape that broadcasts with what they are compared with.

    cross: `<c, d>`. square: `<d, d>`. kept: coordinates that trimming keeps.
    """

    cross: np.ndarray
    square: np.ndarray
    kept: np.ndarray

    def relative_norms(self, centre: np.ndarray | float) -> np.ndarray:
        """Of the vectors, over the norm of the centre; centre: `<c, c>`."""
        norms: np.ndarray = np.sqrt(np.maximum(self.square, 0.0)) / np.sqrt(np.maximum(centre, _TINY))
        return norms


def related(
    centre: np.ndarray | float,
    left: VectorSums,
    right: VectorSums,
    of_pairs: Sequence[np.ndarray],
    with_base: bool,
) -> dict[str, np.ndarray]:
    """The signals of pairs of `WeightSums.signals`; a vector's distance to itself is 0 but for rounding.

    of_pairs: products of the vectors, then the other three fields of `WeightSums`.
    """
    gram, sign_product, sign_support, overlap = of_pairs
    raw = centre + left.cross + right.cross + gram
    raw_left, raw_right = (
        np.sqrt(np.maximum(centre + one.cross + one.cross + one.square, _TINY)) for one in (left, right)
    )
    squares = [np.maximum(one.square, 0.0) for one in (left, right)]
    distance = np.sqrt(np.maximum(squares[0] + squares[1] - 2.0 * gram, 0.0))
    centre_norm = np.sqrt(np.maximum(centre, _TINY))
    signals = {
        "cosine": np.clip(raw / (raw_left * raw_right), -1.0, 1.0),
        "l2": distance / centre_norm,
    }
    if with_base:
        norms = [np.sqrt(square) for square in squares]
        products = norms[0] * norms[1]
        logs = [np.log(np.maximum(norm, NORM_FLOOR * centre_norm)) for norm in norms]
        kept = [np.sqrt(np.maximum(one.kept, 1.0)) for one in (left, right)]
        conflicts = 0.5 * (sign_support - sign_product)
        signals |= {
            "task_vector_cosine": np.clip(
                np.divide(gram, products, out=np.zeros_like(gram), where=products > 0), -1.0, 1.0
            ),
            "task_vector_norm_ratio": logs[0] - logs[1],
            "sign_conflict": conflicts / np.maximum(sign_support, 1.0),
            "trimmed_overlap": overlap / (kept[0] * kept[1]),
        }
    return signals


_TILE = 2048  # columns: that many of all rows stay in the cache while every pair is multiplied


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _add_products(centre: np.ndarray, vectors: np.ndarray, gram: np.ndarray) -> None:
    """Inner products in float64 of [centre, *vectors], float32, added to `gram`."""
    num, size = vectors.shape
    for start in range(0, size, _TILE):
        stop = min(start + _TILE, size)
        for i in range(num + 1):
            left = centre[start:stop] if i == 0 else vectors[i - 1, start:stop]
            for j in range(i + 1):
                right = centre[start:stop] if j == 0 else vectors[j - 1, start:stop]
                total = 0.0
                for k in range(stop - start):
                    total += np.float64(left[k]) * np.float64(right[k])
                gram[i, j] += total
                if j < i:
                    gram[j, i] += total


@njit(cache=True, nogil=True)
def _pack(vectors: np.ndarray, thresholds: np.ndarray, bits: np.ndarray) -> None:
    """One bit a coordinate: negative; not zero; kept by trimming. bits: (3, M, words) uint64, zero."""
    num, size = vectors.shape
    for i in range(num):
        low = thresholds[i]
        for word in range(bits.shape[2]):
            negative, moved, kept = np.uint64(0), np.uint64(0), np.uint64(0)
            for k in range(word * 64, min(word * 64 + 64, size)):
                value = vectors[i, k]
                place = np.uint64(k - word * 64)
                negative |= np.uint64(value < 0) << place
                moved |= np.uint64(value != 0) << place
                kept |= np.uint64((value != 0) & (abs(value) >= low)) << place
            bits[0, i, word], bits[1, i, word], bits[2, i, word] = negative, moved, kept


@intrinsic
def _count_ones(typing_context: Any, word: Any) -> Any:  # uint64 -> how many of its bits are set
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), codegen


@njit(cache=True, nogil=True)
def _count_common(bits: np.ndarray, counts: np.ndarray) -> None:
    """Per pair: moved by both in opposite directions; moved by both; kept of both. counts: (3, M, M) int64, zero."""
    for i in range(bits.shape[1]):
        for j in range(i + 1):
            opposite, both, kept = np.uint64(0), np.uint64(0), np.uint64(0)
            for word in range(bits.shape[2]):
                moved = bits[1, i, word] & bits[1, j, word]
                opposite += _count_ones(moved & (bits[0, i, word] ^ bits[0, j, word]))
                both += _count_ones(moved)
                kept += _count_ones(bits[2, i, word] & bits[2, j, word])
            counts[0, i, j] = counts[0, j, i] = opposite
            counts[1, i, j] = counts[1, j, i] = both
            counts[2, i, j] = counts[2, j, i] = kept


def sums_in_blocks(
    read: Callable[[int, int], tuple[np.ndarray, np.ndarray]],
    num_elements: int,
    thresholds: np.ndarray,
    block: int = BLOCK_ELEMENTS,
) -> WeightSums:
    """Sums over a tensor in blocks from its start, folded in their order.

    Args:
        read: `(start, stop) -> (vectors (M, N), centre (N,))`, float32, vectors being `w_i - c`.
        thresholds: (M,), the smallest magnitude that trimming keeps of each; zeros are never kept.
    """
    num, low = len(thresholds), np.asarray(thresholds, dtype=np.float32)
    total = WeightSums.zero(num)
    for start in range(0, num_elements, block):
        vectors, centre = read(start, min(start + block, num_elements))
        gram = np.zeros((num + 1, num + 1))
        _add_products(centre, vectors, gram)
        total = total + counted_sums(gram, packed_bits(vectors, low))
    return total


def packed_bits(vectors: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """What signs and trimming are counted from, (3, M, words) uint64; see `counted_sums`. vectors: (M, N) float32.
    thresholds: (M,) float32."""
    bits = np.zeros((3, len(vectors), -(-vectors.shape[1] // 64)), dtype=np.uint64)
    _pack(vectors, thresholds, bits)
    return bits


def counted_sums(gram: np.ndarray, bits: np.ndarray) -> WeightSums:
    """Sums of M vectors from their inner products and their `packed_bits`."""
    counts = np.zeros((3, *2 * bits.shape[1:2]), dtype=np.int64)
    _count_common(bits, counts)
    opposite, both, kept = counts.astype(np.float64)
    return WeightSums(gram, both - 2 * opposite, both, kept)


def weight_matrices(sums: Mapping[str, WeightSums], with_base: bool) -> dict[str, np.ndarray]:
    """(M, M) matrices of every weight signal from the sums of every tensor by name.

    Per signal: `_global` over all coordinates; `_attention`, `_mlp`, `_embedding`, `_norm` over those of one kind
    (global where there are none); over tensors `_mean`, `_sd`, `_min`, and the mean over the tensors of the `_early`,
    `_middle` and `_late` third of the layers. `task_vector_norm` once.
    """
    names = sorted(sums)
    groups: dict[str, WeightSums] = {}
    for name in names:
        for group in ("global", tensor_kind(name)):
            groups[group] = groups[group] + sums[name] if group in groups else sums[name]
    of_group = {group: groups.get(group, groups["global"]).signals(with_base) for group in ("global", *TENSOR_KINDS)}
    norms = of_group["global"].get("task_vector_norm")
    by_tensor = [sums[name].signals(with_base) for name in names]
    stacked = {signal: np.stack([signals[signal] for signals in by_tensor]) for signal in by_tensor[0]}
    matrices = grouped(of_group, stacked, names)
    return matrices if norms is None else matrices | {"task_vector_norm": norms}


def grouped(
    of_group: Mapping[str, Mapping[str, np.ndarray]], by_tensor: Mapping[str, np.ndarray], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """The columns of signals of pairs, see `weight_matrices`, from those of groups and (T, ...) of all tensors."""
    thirds = _thirds([tensor_layer(name) for name in names])
    matrices: dict[str, np.ndarray] = {}
    for signal, values in by_tensor.items():
        if signal == "task_vector_norm":
            continue
        prefix = f"weight_{signal}" if signal in ("cosine", "l2") else signal
        matrices |= {f"{prefix}_{group}": signals[signal] for group, signals in of_group.items()}
        statistics = {"mean": values.mean(0), "sd": values.std(0), "min": values.min(0)}
        statistics |= {third: values[index].mean(0) for third, index in thirds.items()}
        matrices |= {f"{prefix}_{statistic}": value for statistic, value in statistics.items()}
    return matrices


def _thirds(layers: Sequence[int | None]) -> dict[str, list[int]]:
    """Indices of the tensors in each third of the layers; all tensors where none has a layer."""
    num_layers = max((layer for layer in layers if layer is not None), default=-1) + 1
    return {
        third: [index for index, layer in enumerate(layers) if layer in chosen] or list(range(len(layers)))
        for third, chosen in layer_thirds(max(1, num_layers)).items()
    }
