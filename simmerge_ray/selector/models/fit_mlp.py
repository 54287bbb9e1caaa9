"""Fit ensembles of networks, as many as there are at once. Seeded. numpy alone.

Each network is trained for itself, so what it becomes does not depend on what it is trained beside; its rows fit the
cache, and networks are spread over threads. The derivatives are written out: with a graph that finds them, most of the
time of a step of such a small network is not arithmetic.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.storage import digest_bytes, digest_json
from simmerge_ray.selector.data.rewards import SingleArms
from simmerge_ray.selector.data.splits import rows_by_pair
from simmerge_ray.selector.data.targets import TrainingSet
from simmerge_ray.selector.models.predictors import MlpPredictor, Network

Job = tuple[TrainingSet, int]  # and which member of its ensemble
# The contrast chooses the arm and is small beside the level: with equal weight the level takes the network.
_CONTRAST_WEIGHT = 4.0
_ROUNDING = 1e-12  # of standardised inputs: a part of them that is smaller everywhere is nothing
_NUM_RECENT = 512  # of the study's 32 KB each
_MOMENTUM, _SQUARES, _EPSILON = 0.9, 0.999, 1e-8  # of AdamW, as everywhere


# Reports fit the same networks again and again: for every question that is asked of the same folds.
_recent: dict[str, Network] = {}
_lock = threading.Lock()


def fit_mlps(sets: Sequence[TrainingSet], config: TrainConfig) -> list[MlpPredictor]:
    """One ensemble per training set, by full-batch AdamW on the squared errors of level and contrasts, the rate falling
    to 0 along a cosine.

    Members differ by their initial weights and by a bootstrap of the pairs (all tasks and both orders of a pair stay
    together).

    A reward of a single arm is one observation, a context one for each of its H heads: beside the contexts, the squared
    error of its utility counts 1/H of one.
    """
    count = config.num_members
    jobs = [(one, member) for one in sets for member in range(count)]
    with ThreadPoolExecutor(_num_threads()) as pool:
        networks = list(pool.map(partial(_fit_network, config=config), jobs))
    return [MlpPredictor(tuple(networks[i : i + count])) for i in range(0, len(jobs), count)]


def _num_threads() -> int:
    """As many as leave each product its own threads, which BLAS takes without being asked: all, unless it is told."""
    cores = os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("OMP_NUM_THREADS") or cores))


def _drawn_counts(one: TrainingSet, config: TrainConfig, member: int) -> np.ndarray:
    """(N,): how often each context counts for a member."""
    groups = [rows for _, rows in sorted(rows_by_pair(one.pairs).items())]
    drawn = np.random.default_rng([config.seed, member]).integers(len(groups), size=len(groups))
    return np.bincount([row for choice in drawn for row in groups[choice]], minlength=len(one.level))


def _drawn_rewards(one: TrainingSet, config: TrainConfig, member: int) -> np.ndarray:
    """(G,): how often each reward counts for a member."""
    if one.rewards is None:
        return np.zeros(0, dtype=np.int64)
    return one.rewards.drawn_counts(np.random.default_rng([config.seed, member, 1]))


@dataclass(frozen=True)
class _Network:
    """A network in training: views of `values` and of `slopes`, the derivatives of the loss by them, (P,) float32.

    matrices: (in, out) of the encoder, then (hidden, 1 + H) of the level and the contrasts. biases: the same, (out,).
    centring: (1 + H, 1 + H), from these to a level and contrasts that sum to zero over the reference arms.
    """

    values: np.ndarray
    slopes: np.ndarray
    matrices: list[np.ndarray]
    biases: list[np.ndarray]
    matrix_slopes: list[np.ndarray]
    bias_slopes: list[np.ndarray]
    reference: tuple[int, ...]
    centring: np.ndarray

    @staticmethod
    def drawn(one: TrainingSet, config: TrainConfig, member: int) -> _Network:
        sizes = (one.inputs.shape[-1], *config.hidden_sizes)
        shapes = [*zip(sizes[:-1], sizes[1:], strict=True), (sizes[-1], 1 + one.num_heads)]
        centring = np.eye(1 + one.num_heads, dtype=np.float32)
        centring[1 + np.array(one.reference), 1:] -= np.float32(1 / len(one.reference))
        num = sum((fan_in + 1) * fan_out for fan_in, fan_out in shapes)
        values, slopes = np.zeros(num, dtype=np.float32), np.zeros(num, dtype=np.float32)
        views = [_views(flat, shapes) for flat in (values, slopes)]
        generator = np.random.RandomState(config.seed & 0xFFFFFFFF)
        for matrix in views[0][0][:-1]:
            matrix[:] = _uniform(generator, config.num_members, *matrix.shape)[member]
        head = views[0][0][-1]
        for columns in (slice(0, 1), slice(1, None)):
            head[:, columns] = _uniform(generator, config.num_members, *head[:, columns].shape)[member]
        return _Network(values, slopes, *views[0], *views[1], one.reference, centring)

    def network(self) -> Network:
        layers = [
            (matrix.astype(np.float64), bias.astype(np.float64))
            for matrix, bias in zip(self.matrices, self.biases, strict=True)
        ]
        *encoder, (matrix, bias) = layers
        chosen = [1 + head for head in self.reference]
        centred = matrix[:, 1:] - matrix[:, chosen].mean(1, keepdims=True), bias[1:] - bias[chosen].mean()
        level = np.ascontiguousarray(matrix[:, :1]), bias[:1]  # as when it is read: of columns apart products differ
        return Network(tuple(encoder), level, centred)


def _views(flat: np.ndarray, shapes: Sequence[tuple[int, int]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Matrices and biases of layers, one after the other in a flat array."""
    matrices, biases, start = [], [], 0
    for fan_in, fan_out in shapes:
        end = start + fan_in * fan_out
        matrices.append(flat[start:end].reshape(fan_in, fan_out))
        biases.append(flat[end : end + fan_out])
        start = end + fan_out
    return matrices, biases


def _uniform(generator: np.random.RandomState, members: int, fan_in: int, fan_out: int) -> np.ndarray:
    """(E, in, out) within 1/sqrt(in): of a whole ensemble, so that a network does not depend on what it is trained
    beside. The numbers are those of `torch.rand`, by which the published selectors were drawn."""
    raw = generator.randint(0, 1 << 32, (members, fan_in, fan_out), dtype=np.uint32)
    drawn: np.ndarray = (raw & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)
    return (2 * drawn - 1) * np.float32(fan_in**-0.5)


class _Rows:
    """N contexts as rows of a network, in one order of the pair or in both: R = N or 2 N, all first orders before the
    second ones. What a step writes is allocated once.

    Inputs of both orders are `mean + half` and `mean - half`, so a product of each gives both. Most features do not
    change with the order: `half` has the columns of the others alone, and `mean` none of those that only change their
    sign, so that this is little more than half of the arithmetic.
    """

    def __init__(self, inputs: np.ndarray, widths: Sequence[int]) -> None:
        """inputs: (N, 1 or 2, D). widths: of the layers of the encoder."""
        num, orders, _ = inputs.shape
        parts = [inputs.mean(1), (inputs[:, 0] - inputs[:, -1]) / 2]
        self._columns = [np.flatnonzero((np.abs(part) > _ROUNDING).any(0)) for part in parts]
        self._parts = [
            np.ascontiguousarray(part[:, kept], dtype=np.float32)
            for part, kept in zip(parts, self._columns, strict=True)
        ]
        self._transposed = [np.ascontiguousarray(part.T) for part in self._parts]
        self._num, self.orders = num, orders
        self._ones = np.ones(num * orders, dtype=np.float32)
        self._hidden = [np.empty((num * orders, width), dtype=np.float32) for width in widths]
        self._errors = [np.empty_like(one) for one in self._hidden]  # derivatives by `hidden`

    def outputs(self, network: _Network) -> np.ndarray:
        """(R, 1 + H): level and contrasts."""
        first = self._hidden[0]
        mean, half = (part @ network.matrices[0][kept] for part, kept in zip(self._parts, self._columns, strict=True))
        mean += network.biases[0]
        np.add(mean, half, out=first[: self._num])
        if self.orders == 2:
            np.subtract(mean, half, out=first[self._num :])
        np.maximum(first, 0, out=first)
        layers = zip(network.matrices[1:-1], network.biases[1:-1], strict=True)
        for below, z, (matrix, bias) in zip(self._hidden, self._hidden[1:], layers, strict=False):
            np.matmul(below, matrix, out=z)
            z += bias
            np.maximum(z, 0, out=z)
        centring = network.centring
        result: np.ndarray = self._hidden[-1] @ (network.matrices[-1] @ centring)
        result += network.biases[-1] @ centring
        return result

    def add_slopes(self, network: _Network, errors: np.ndarray) -> None:
        """Add the derivatives of a loss, given those (R, 1 + H) by the last outputs."""
        matrix, slopes, bias_slopes = network.matrices[-1], network.matrix_slopes, network.bias_slopes
        errors = errors @ network.centring.T  # by what is not centred yet
        for number in range(len(self._hidden) - 1, -1, -1):
            z, below = self._hidden[number], self._errors[number]
            slopes[number + 1] += z.T @ errors
            bias_slopes[number + 1] += self._ones @ errors
            np.matmul(errors, matrix.T, out=below)
            np.multiply(below, z > 0, out=below)
            errors, matrix = below, network.matrices[number]
        bias_slopes[0] += self._ones @ errors
        mean = half = errors[: self._num]
        if self.orders == 2:
            mean, half = errors[: self._num] + errors[self._num :], errors[: self._num] - errors[self._num :]
        for part, kept, error in zip(self._transposed, self._columns, (mean, half), strict=True):
            slopes[0][kept] += part @ error


class _Contexts:
    """The contexts that a member has drawn, and their squared errors."""

    def __init__(self, one: TrainingSet, count: np.ndarray, total: float, config: TrainConfig) -> None:
        """count: (N,), how often each counts. total: of which this is a part."""
        rows = np.flatnonzero(count)
        contrasts = one.contrasts[rows].transpose(1, 0, 2).reshape(-1, one.num_heads)
        known = ~np.isnan(contrasts)
        self._rows = _Rows(one.inputs[rows], config.hidden_sizes)
        level = np.tile(one.level[rows], self._rows.orders)[:, None]
        self._targets = np.hstack([level, np.where(known, contrasts, 0.0)]).astype(np.float32)
        share = np.tile(count[rows] / total / self._rows.orders, self._rows.orders)[:, None]
        weights = share * np.hstack([np.ones_like(share), _CONTRAST_WEIGHT / one.num_heads * known])
        self._slopes = (2 * weights).astype(np.float32)
        self.mean_level = float(share[:, 0] @ level[:, 0] / share.sum())

    def add_slopes(self, network: _Network) -> None:
        errors = self._rows.outputs(network)
        errors -= self._targets
        errors *= self._slopes
        self._rows.add_slopes(network, errors)


class _Rewards:
    """Rewards that a member has drawn, and the squared errors of their utilities."""

    def __init__(self, one: SingleArms, num_heads: int, count: np.ndarray, total: float, config: TrainConfig) -> None:
        num, _, num_tasks, dim = one.inputs.shape
        self._rows = _Rows(one.inputs.transpose(0, 2, 1, 3).reshape(-1, 2, dim), config.hidden_sizes)
        taken = np.zeros((num, 1, 1 + num_heads))
        taken[:, 0, 0] = taken[np.arange(num), 0, 1 + one.heads] = 1.0
        # (G, T, 1 + H): what a row's outputs add to the utility of its merge.
        self._taken = (taken * one.shares[..., None]).astype(np.float32)
        self._utility = one.utility.astype(np.float32)
        self._slopes = (2 * count / num_heads / total / 2).astype(np.float32)

    def add_slopes(self, network: _Network) -> None:
        outputs = self._rows.outputs(network).reshape(2, *self._taken.shape)
        errors = (np.einsum("ogth,gth->og", outputs, self._taken) - self._utility) * self._slopes
        slopes = errors[..., None, None] * self._taken
        self._rows.add_slopes(network, slopes.reshape(-1, slopes.shape[-1]))


def _fit_network(job: Job, config: TrainConfig) -> Network:
    """One of `_recent`, or trained."""
    one, member = job
    key = _digest(one, member, config)
    network = _recent.get(key)
    if network is None:
        network = _trained(one, member, config)
        with _lock:
            _recent[key] = network
            while len(_recent) > _NUM_RECENT:
                _recent.pop(next(iter(_recent)))
    return network


def _digest(one: TrainingSet, member: int, config: TrainConfig) -> str:
    """Of all that a network is made of."""
    arrays = [one.inputs, one.level, one.contrasts]
    if one.rewards is not None:
        arrays += vars(one.rewards).values()
    told = [config.model_dump(mode="json"), member, one.reference, one.pairs, [array.shape for array in arrays]]
    return digest_bytes(digest_json(told).encode(), *(array.tobytes() for array in arrays))


def _trained(one: TrainingSet, member: int, config: TrainConfig) -> Network:
    network = _Network.drawn(one, config, member)
    count, rewarded = _drawn_counts(one, config, member), _drawn_rewards(one, config, member)
    total = count.sum() + rewarded.sum() / one.num_heads
    contexts = _Contexts(one, count, total, config)
    observed: list[_Contexts | _Rewards] = [contexts]
    if one.rewards is not None:
        observed.append(_Rewards(one.rewards, one.num_heads, rewarded, total, config))
    network.biases[-1][0] = contexts.mean_level
    values, slopes = network.values, network.slopes
    momentum, squares, root = np.zeros_like(values), np.zeros_like(values), np.empty_like(values)
    for step in range(config.num_epochs):
        slopes[:] = 0
        for part in observed:
            part.add_slopes(network)
        rate = config.learning_rate * (1 + math.cos(math.pi * step / config.num_epochs)) / 2
        values *= np.float32(1 - rate * config.weight_decay)
        momentum += (slopes - momentum) * np.float32(1 - _MOMENTUM)
        squares *= np.float32(_SQUARES)
        squares += slopes * slopes * np.float32(1 - _SQUARES)
        np.sqrt(squares, out=root)
        root *= np.float32(1 / math.sqrt(1 - _SQUARES ** (step + 1)))
        root += np.float32(_EPSILON)
        values -= np.float32(rate / (1 - _MOMENTUM ** (step + 1))) * momentum / root
    return network.network()
