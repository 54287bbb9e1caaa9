"""Signals of new checkpoints with all others, from signatures alone: what they add to a table, and no pair twice.

The new ones, N of them, stay in memory; the others come one after the other, so memory does not grow with their number
and time grows linearly. The numbers are those of `pairs.output_matrices` and `weights.weight_matrices` on all
checkpoints, to rounding. Only with a base and sampled weights: without a base everything is centred on the mean, which
every checkpoint moves, and exact sums read all weights again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit

from simmerge_ray.checkpoints.kinds import TENSOR_KINDS, tensor_kind
from simmerge_ray.signals.cosines import cosine_statistics
from simmerge_ray.signals.divergence import log_softmax
from simmerge_ray.signals.features import feature_columns
from simmerge_ray.signals.pair_blocks import MemoryBlock
from simmerge_ray.signals.pairs import kl_statistics
from simmerge_ray.signals.samples import trim_threshold
from simmerge_ray.signals.signature import TaskOutputs, Weights
from simmerge_ray.signals.weights import VectorSums, grouped, related

_MIN_NORM = 1e-12  # as in `cosines`
_CHUNK = 8  # others that are compared at a time
Sides = dict[str, tuple[np.ndarray, np.ndarray]]  # by column: (N, C) with the new one on the left, and on the right


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _row_products(left: np.ndarray, right: np.ndarray, products: np.ndarray) -> None:
    """Inner products in float64 of the same row of float32 (N, R, D) and (R, D); (N, R)."""
    for row in range(right.shape[0]):
        for one in range(left.shape[0]):
            total = 0.0
            for k in range(right.shape[1]):
                total += np.float64(left[one, row, k]) * np.float64(right[row, k])
            products[one, row] = total


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _sample_sums(
    left: np.ndarray, right: np.ndarray, low: np.ndarray, low_right: np.ndarray, starts: np.ndarray, sums: np.ndarray
) -> None:
    """Of every tensor (`starts` in the flat samples): product; coordinates moved in opposite directions; moved by both;
    kept of both. left (N, S), right (S,) float32; low (N, T), low_right (T,); sums (N, T, 4)."""
    for one in range(left.shape[0]):
        for tensor in range(len(starts) - 1):
            product, opposite, both, kept = 0.0, 0, 0, 0
            own, other = low[one, tensor], low_right[tensor]
            for k in range(starts[tensor], starts[tensor + 1]):
                a, b = left[one, k], right[k]
                product += np.float64(a) * np.float64(b)
                moved = (a != 0) & (b != 0)
                both += moved
                opposite += moved & ((a < 0) != (b < 0))
                kept += moved & (abs(a) >= own) & (abs(b) >= other)
            sums[one, tensor, 0], sums[one, tensor, 1] = product, opposite
            sums[one, tensor, 2], sums[one, tensor, 3] = both, kept


@dataclass(frozen=True)
class _Sample:
    """One checkpoint's task vector at the sampled coordinates: flat (S,), low (T,), exact (T, 2) `<c, d>`, `<d, d>`,
    own (T, 2) `<d, d>` of the sample and coordinates that trimming keeps."""

    flat: np.ndarray
    low: np.ndarray
    exact: np.ndarray
    own: np.ndarray


class NewWeights:
    """Weight signals of N new checkpoints with others. base: of the base. new: of the new ones."""

    def __init__(self, base: Weights, new: Sequence[Weights]) -> None:
        self._names = sorted(base)
        sizes = [len(base[name].values) for name in self._names]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._base = np.concatenate([base[name].values for name in self._names])
        self._scale = np.array([base[name].scale for name in self._names])
        self._centre = np.array([base[name].sums[0] for name in self._names])
        self._is_whole = self._scale == 1.0
        kinds = [tensor_kind(name) for name in self._names]
        every = np.arange(len(kinds))
        of_kind = {kind: np.array([i for i in every if kinds[i] == kind], dtype=np.int64) for kind in TENSOR_KINDS}
        self._groups = {"global": every} | {kind: one if len(one) else every for kind, one in of_kind.items()}
        self._new = [self._sample(one) for one in new]
        self._flat, self._low = (np.stack([getattr(one, name) for one in self._new]) for name in ("flat", "low"))

    def _sample(self, weights: Weights) -> _Sample:
        flat = np.concatenate([weights[name].values for name in self._names]) - self._base
        low = np.array([trim_threshold(weights[name]) for name in self._names], dtype=np.float32)
        own = self._sums(flat[None], low[None], flat, low)[0]
        exact = np.array([weights[name].sums[1:] for name in self._names])
        return _Sample(flat, low, exact, own[:, [0, 3]])

    def _sums(self, left: np.ndarray, low: np.ndarray, right: np.ndarray, low_right: np.ndarray) -> np.ndarray:
        """(N, T, 4), scaled to the whole tensors."""
        sums = np.empty((len(left), len(self._names), 4))
        _sample_sums(left, right, low, low_right, self._starts, sums)
        return sums * self._scale[:, None]

    def signals(self, others: Sequence[Weights]) -> Sides:
        """The weight columns of the new ones with others, (N, C)."""
        right = [self._sample(one) for one in others]
        # (T, N, C) each
        sums = np.stack([self._sums(self._flat, self._low, one.flat, one.low) for one in right], axis=2)
        product, opposite, both, kept = sums.transpose(3, 1, 0, 2)
        sides = self._vectors(self._new, 2), self._vectors(right, 1)
        ratios = [self._ratios(self._new)[:, :, None], self._ratios(right)[:, None]]
        gram, centre = product * ratios[0] * ratios[1], self._centre[:, None, None]
        parts = (gram, both - 2 * opposite, both, kept)
        of_group = {}
        for group, chosen in self._groups.items():
            total = [VectorSums(*(values[chosen].sum(0) for values in vars(side).values())) for side in sides]
            sums_of = [part[chosen].sum(0) for part in parts]
            of_group[group] = related(centre[chosen].sum(0), total[0], total[1], sums_of, True)
        columns = grouped(of_group, related(centre, *sides, parts, True), self._names)
        found = {name: (value, _turned(name, value)) for name, value in columns.items()}
        norms = [VectorSums(*(v.sum(0) for v in vars(one).values())).relative_norms(centre.sum(0)) for one in sides]
        return found | _singles("task_vector_norm", norms[0], norms[1])

    def _vectors(self, samples: Sequence[_Sample], axis: int) -> VectorSums:
        """Exact sums, and kept coordinates of the sample; axis: the one of the other side, which is 1 long."""
        exact = np.expand_dims(np.stack([one.exact for one in samples], axis=1), axis)
        own = np.expand_dims(np.stack([one.own for one in samples], axis=1), axis)
        return VectorSums(exact[..., 0], exact[..., 1], own[..., 1])

    def _ratios(self, samples: Sequence[_Sample]) -> np.ndarray:
        """(T, N) by which products of the sample are multiplied: see `WeightSums.with_norms`."""
        exact, own = np.stack([one.exact[:, 1] for one in samples], 1), np.stack([one.own[:, 0] for one in samples], 1)
        true, sampled = np.sqrt(np.maximum(exact, 0.0)), np.sqrt(np.maximum(own, 0.0))
        ratio = np.divide(true, sampled, out=np.zeros_like(true), where=sampled > 0)
        return np.where(self._is_whole[:, None], 1.0, ratio)


def _turned(name: str, values: np.ndarray) -> np.ndarray:
    """A column of (right, left) from that of (left, right)."""
    return -values if name.startswith("task_vector_norm_ratio") and not name.endswith("_sd") else values


def _singles(name: str, new: np.ndarray, others: np.ndarray) -> Sides:
    """Columns `_left` and `_right` of a signal of single checkpoints; shapes that broadcast to (N, C)."""
    of_new, of_others = np.broadcast_arrays(new, others)
    return {f"{name}_left": (of_new, of_others), f"{name}_right": (of_others, of_new)}


class NewOutputs:
    """Signals on one task of N new checkpoints with others. base: of the base."""

    def __init__(self, base: TaskOutputs, new: Sequence[TaskOutputs]) -> None:
        self._greedy = base.greedy
        self._labelled = (base.next_token >= 0) & ~base.greedy
        self._token = torch.from_numpy(base.next_token.clip(0))
        self._reference = log_softmax(torch.from_numpy(base.logits))
        self._shapes = base.logits.shape, base.hidden.shape, base.attention.shape
        of_new = [self._divergent(one) for one in new]
        self._probabilities = torch.stack([one[0] for one in of_new], 1)  # (S, N, V)
        self._centred = torch.stack([one[1] for one in of_new], 1)
        self._own = torch.stack([one[2] for one in of_new], 1)  # (S, N)
        self._single = [np.stack([one[3][i] for one in of_new])[:, None] for i in range(2)]
        self._hidden = np.stack([_rows(one.hidden) for one in new])
        self._attention = np.stack([_rows(one.attention) for one in new])
        self._norms = [_norms(rows) for rows in (self._hidden, self._attention)]

    def _divergent(self, one: TaskOutputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[float, float]]:
        """Probabilities and log-probabilities less the base's, (S, V); their products (S,); entropy and loss."""
        if (one.logits.shape, one.hidden.shape, one.attention.shape) != self._shapes:
            raise ValueError("outputs of different positions, vocabularies or layers cannot be compared")
        log_probs = log_softmax(torch.from_numpy(one.logits))
        probabilities, centred = log_probs.exp(), log_probs - self._reference
        entropy = -(probabilities * log_probs).sum(-1).numpy()
        loss = -log_probs.gather(-1, self._token[:, None])[:, 0].numpy()
        single = float(entropy[~self._greedy].mean()), float(loss[self._labelled].mean())
        return probabilities, centred, (probabilities * centred).sum(-1), single

    def signals(self, others: Sequence[TaskOutputs]) -> Sides:
        """The columns of outputs of the new ones with others, (N, C)."""
        kl = np.empty((2, len(self._greedy), len(self._hidden), len(others)))
        singles = np.empty((2, 1, len(others)))
        for place, one in enumerate(others):
            probabilities, centred, own, singles[:, 0, place] = self._divergent(one)
            forward = self._own - (self._probabilities @ centred[:, :, None])[..., 0]
            back = own[:, None] - (self._centred @ probabilities[:, :, None])[..., 0]
            kl[0, :, :, place], kl[1, :, :, place] = forward.clamp_min(0.0), back.clamp_min(0.0)
        found: Sides = {}
        for name, chosen in (("kl_{}", ~self._greedy), ("kl_greedy_{}", self._greedy)):
            to_others, from_others = (kl_statistics("", side[chosen]) for side in kl)
            for statistic, lr in to_others.items():
                rl = from_others[statistic]
                found[name.format("lr") + statistic], found[name.format("rl") + statistic] = (lr, rl), (rl, lr)
        for index, name in enumerate(("entropy", "loss")):
            found |= _singles(name, self._single[index], singles[index])
        rows = [("activation_cosine", self._hidden, self._norms[0], [one.hidden for one in others])]
        rows.append(("attention_cosine", self._attention, self._norms[1], [one.attention for one in others]))
        for name, new, norms, of_others in rows:
            cosines = np.stack([_cosines(new, norms, _rows(one)) for one in of_others], axis=2)  # (N, R, C)
            layers = torch.from_numpy(cosines.transpose(1, 0, 2)).chunk(len(of_others[0]))
            statistics = cosine_statistics(layers)
            found |= {f"{name}_{key}": (value.numpy(), value.numpy()) for key, value in statistics.items()}
        return found


def _rows(values: np.ndarray) -> np.ndarray:
    """Of all layers, (R, D) float32."""
    return np.ascontiguousarray(values.reshape(-1, values.shape[-1]), dtype=np.float32)


def _norms(rows: np.ndarray) -> np.ndarray:
    """(N, R) of rows (N, R, D)."""
    products = np.empty(rows.shape[:2])
    for place, one in enumerate(rows):
        _row_products(one[None], one, products[place : place + 1])
    return np.maximum(np.sqrt(products), _MIN_NORM)


def _cosines(new: np.ndarray, norms: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N, R), of rows (N, R, D) with norms (N, R), and rows (R, D) of another checkpoint."""
    products = np.empty(norms.shape)
    _row_products(new, other, products)
    return np.asarray((products / (norms * _norms(other[None]))).clip(-1.0, 1.0))


def new_block(
    start: int,
    stop: int,
    tasks: Sequence[str],
    weights: Callable[[int], Weights],
    outputs: Callable[[int, str], TaskOutputs],
) -> MemoryBlock:
    """The block of points [start, stop), the base being point 0. weights, outputs: of a point."""
    columns, lacking = feature_columns(True), set(feature_columns(True)) - set(feature_columns(True, base_pair=True))
    new, places = range(start, stop), [range(i, min(i + _CHUNK, stop)) for i in range(0, stop, _CHUNK)]
    of_weights = NewWeights(weights(0), [weights(one) for one in new])
    shared = _joined(of_weights.signals([weights(one) for one in chunk]) for chunk in places)
    values = {}
    for task in tasks:
        of_task = NewOutputs(outputs(0, task), [outputs(one, task) for one in new])
        sides = shared | _joined(of_task.signals([outputs(one, task) for one in chunk]) for chunk in places)
        for column in lacking:
            for side in sides[column]:
                side[:, 0] = np.nan  # the base has no task vector
        values[task] = np.stack([_block_rows(*sides[column], start) for column in columns])
    return MemoryBlock(start, stop, columns, values)


def _joined(parts: Iterable[Mapping[str, tuple[np.ndarray, np.ndarray]]]) -> Sides:
    """Chunks of others, side by side."""
    listed = list(parts)
    return {
        name: (np.concatenate([one[name][0] for one in listed], 1), np.concatenate([one[name][1] for one in listed], 1))
        for name in listed[0]
    }


def _block_rows(forward: np.ndarray, back: np.ndarray, start: int) -> np.ndarray:
    """The rows of a block, see `pair_blocks`; forward, back: (N, stop) with the new one on the left, on the right."""
    new, stop = forward.shape
    apart = np.ones((new, stop), dtype=bool)
    apart[np.arange(new), start + np.arange(new)] = False
    return np.concatenate([back[:, :start].T.ravel(), forward[apart]])
