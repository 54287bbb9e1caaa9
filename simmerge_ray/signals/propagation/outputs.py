"""Outputs of intermediates: mixed of those of the checkpoints, and compared on one task.

Comparison is of chosen pairs, where `signals.pairs` takes all. Outputs are prepared once (softmax, norms) however many
others they are compared with; a pair is then one walk through both. All in float64, to rounding what `signals.pairs`
finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from simmerge_ray.signals.cosines import cosine_statistics
from simmerge_ray.signals.divergence import log_softmax
from simmerge_ray.signals.pairs import kl_statistics
from simmerge_ray.signals.propagation.kernels import add_scaled, row_divergences, row_dots
from simmerge_ray.signals.signature import TaskOutputs

_MIN_NORM = 1e-12  # a zero row has cosine 0 with all
_BLOCK = 1 << 15  # elements whose sums stay in the cache while every source is added


def mixed_outputs(outputs: Sequence[TaskOutputs], shares: Sequence[float]) -> TaskOutputs:
    """`l_m = sum_i a_i l_i` for logits and hidden states (cross-task linearity, arXiv:2402.03660), `sum_i a_i = 1`.

    Attention rows are mixed in the same way, clipped at 0 and scaled to the sum that the mixture had.
    """

    def mixed(arrays: Sequence[np.ndarray]) -> np.ndarray:
        total = np.zeros(arrays[0].shape)
        sums, values = total.reshape(-1), [np.ascontiguousarray(array).reshape(-1) for array in arrays]
        for start in range(0, len(sums), _BLOCK):
            block = slice(start, start + _BLOCK)
            for share, one in zip(shares, values, strict=True):
                add_scaled(sums[block], share, one[block])
        return total

    attention = mixed([one.attention for one in outputs])
    total = attention.sum(-1, keepdims=True)
    attention = attention.clip(0.0)
    attention *= total / np.maximum(attention.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
    return replace(
        outputs[0],
        logits=mixed([one.logits for one in outputs]).astype(np.float32),
        hidden=mixed([one.hidden for one in outputs]).astype(np.float32),
        attention=attention.astype(np.float32),
    )


@dataclass(frozen=True)
class PreparedOutputs:
    """Outputs of one checkpoint on a task with what every comparison needs of them.

    log_probs, probs: (S, V) float64. entropy, loss: means over the prompt's positions. hidden, attention: one (rows, D)
    float32 array per layer, with the norms of their rows, (rows,) float64.
    """

    outputs: TaskOutputs
    log_probs: np.ndarray
    probs: np.ndarray
    entropy: float
    loss: float
    hidden: tuple[tuple[np.ndarray, np.ndarray], ...]
    attention: tuple[tuple[np.ndarray, np.ndarray], ...]


def prepared_outputs(outputs: TaskOutputs) -> PreparedOutputs:
    log_probs = log_softmax(torch.from_numpy(outputs.logits)).numpy()
    probs = np.exp(log_probs)
    prompt = ~outputs.greedy
    labelled = np.flatnonzero(prompt & (outputs.next_token >= 0))
    entropy = -np.einsum("sv,sv->s", probs, log_probs)[prompt].mean()
    loss = -log_probs[labelled, outputs.next_token[labelled]].mean()
    hidden, attention = (tuple(_rows(layer) for layer in layers) for layers in (outputs.hidden, outputs.attention))
    return PreparedOutputs(outputs, log_probs, probs, float(entropy), float(loss), hidden, attention)


def _rows(layer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.ascontiguousarray(layer).reshape(-1, layer.shape[-1])
    squares = np.empty(len(rows))
    row_dots(rows, rows, squares)
    return rows, np.sqrt(squares).clip(_MIN_NORM)


class OutputPairs:
    """Room for N pairs of checkpoints on one task; pairs may be put in by several threads."""

    def __init__(self, num: int, like: TaskOutputs, with_base: bool) -> None:
        """
        Args:
            like: outputs of the shapes that all have. with_base: whether there are greedy positions.
        """
        self._with_base, self._greedy = with_base, like.greedy
        self._divergences = np.empty((num, 2, len(like.logits)))
        self._single = np.empty((num, 2, 2))
        self._cosines = [
            [np.empty((num, layer[..., 0].size)) for layer in layers] for layers in (like.hidden, like.attention)
        ]

    def put(self, place: int, left: PreparedOutputs, right: PreparedOutputs) -> None:
        """Compare one pair. Raises ValueError: outputs at different positions."""
        one, other = left.outputs, right.outputs
        if one.logits.shape != other.logits.shape or one.hidden.shape != other.hidden.shape:
            raise ValueError("outputs of different positions, vocabularies or layers cannot be compared")
        row_divergences(left.log_probs, left.probs, right.log_probs, right.probs, self._divergences[place])
        self._single[place] = (left.entropy, left.loss), (right.entropy, right.loss)
        for cosines, layers in zip(
            self._cosines, ((left.hidden, right.hidden), (left.attention, right.attention)), strict=True
        ):
            for found, (rows, norms), (others, other_norms) in zip(cosines, *layers, strict=True):
                row_dots(rows, others, found[place])
                found[place] /= norms * other_norms

    def columns(self) -> dict[str, np.ndarray]:
        """Every feature column of outputs, (N,) each."""
        by_position = self._divergences.transpose(2, 1, 0)  # (S, 2, N)
        statistics = kl_statistics("kl_lr", by_position[~self._greedy])
        if self._with_base:
            statistics |= kl_statistics("kl_greedy_lr", by_position[self._greedy])
        columns = {}
        for name, both in statistics.items():
            columns[name], columns[name.replace("_lr_", "_rl_")] = both
        for index, name in enumerate(("entropy", "loss")):
            columns[f"{name}_left"], columns[f"{name}_right"] = self._single[:, :, index].T
        for name, layers in zip(("activation_cosine", "attention_cosine"), self._cosines, strict=True):
            found = cosine_statistics([torch.from_numpy(one.clip(-1.0, 1.0).T[:, None]) for one in layers])
            columns |= {f"{name}_{statistic}": value[0].numpy() for statistic, value in found.items()}
        return columns
