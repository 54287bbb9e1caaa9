"""Signals of the outputs of many pairs of checkpoints on one task: of chosen pairs, where `signals.pairs` takes all.

A checkpoint is prepared once (softmax, norms) however many others it is compared with; a pair is then one walk through
both. All in float64, to rounding what `signals.pairs` finds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from simmerge_ray.signals.cosines import CosineMoments
from simmerge_ray.signals.divergence import log_softmax
from simmerge_ray.signals.pairs import kl_statistics
from simmerge_ray.signals.propagation.kernels import row_divergences, row_dots
from simmerge_ray.signals.signature import TaskOutputs

_MIN_NORM = 1e-12  # a zero row has cosine 0 with all


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
        """Compare one pair.

        Raises:
            ValueError: outputs at different positions.
        """
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
            moments = CosineMoments.of([torch.from_numpy(one.clip(-1.0, 1.0).T[:, None]) for one in layers])
            columns |= {f"{name}_{statistic}": value[0].numpy() for statistic, value in moments.finish().items()}
        return columns
