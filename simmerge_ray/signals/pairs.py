"""Signals of all pairs from the outputs of M checkpoints, real or virtual, at the sampled positions; all in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from simmerge_ray.signals.bounds import BLOCK_VALUES
from simmerge_ray.signals.cosines import cosine_statistics, pairwise_cosine
from simmerge_ray.signals.divergence import log_softmax, pairwise_kl
from simmerge_ray.signals.signature import TaskOutputs


def output_matrices(outputs: Sequence[TaskOutputs], with_base: bool) -> dict[str, np.ndarray]:
    """(M, M) matrices of the signals of one task; single-checkpoint values are rows, the same in every column.

    Args:
        outputs: of M checkpoints at the same positions. with_base: whether there are greedy positions.

    Raises:
        ValueError: outputs at different positions.
    """
    first = outputs[0]
    if any(one.logits.shape != first.logits.shape or one.hidden.shape != first.hidden.shape for one in outputs):
        raise ValueError("outputs of different positions, vocabularies or layers cannot be compared")
    kl, entropy, loss = _divergences(outputs)
    greedy = first.greedy
    matrices = kl_statistics("kl_lr", kl[~greedy])
    if with_base:
        matrices |= kl_statistics("kl_greedy_lr", kl[greedy])
    labelled = (first.next_token >= 0) & ~greedy
    for name, values in (("entropy", entropy[:, ~greedy]), ("loss", loss[:, labelled])):
        matrices[name] = np.repeat(values.mean(1)[:, None], len(outputs), axis=1)
    for name, by_layer in (
        ("activation_cosine", [one.hidden for one in outputs]),
        ("attention_cosine", [one.attention for one in outputs]),
    ):
        layers = (torch.from_numpy(np.stack(layer)).double() for layer in zip(*by_layer, strict=True))
        statistics = cosine_statistics([pairwise_cosine(one).flatten(0, -3) for one in layers])
        matrices |= {f"{name}_{statistic}": value.numpy() for statistic, value in statistics.items()}
    return matrices


def _divergences(outputs: Sequence[TaskOutputs]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """KL (S, M, M), entropy (M, S) and loss (M, S), of the token 0 where there is no next one."""
    num, (positions, vocabulary) = len(outputs), outputs[0].logits.shape
    step = max(1, BLOCK_VALUES // (num * vocabulary))
    kl, entropies, losses = [], [], []
    for start in range(0, positions, step):
        block = slice(start, start + step)
        logits = torch.from_numpy(np.stack([one.logits[block] for one in outputs]))
        log_probs = log_softmax(logits)  # (M, s, V)
        kl.append(pairwise_kl(log_probs).numpy())
        entropies.append(-(log_probs.exp() * log_probs).sum(-1).numpy())
        tokens = torch.from_numpy(outputs[0].next_token[block].clip(0))
        losses.append(-log_probs.gather(-1, tokens.expand(num, -1)[..., None])[..., 0].numpy())
    return np.concatenate(kl), np.concatenate(entropies, axis=1), np.concatenate(losses, axis=1)


def kl_statistics(name: str, kl: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and quantiles over the positions, the first axis of `kl`; by name of the statistic."""
    matrices = {f"{name}_mean": kl.mean(0)}
    for statistic, level in (("q10", 0.1), ("median", 0.5), ("q90", 0.9)):
        matrices[f"{name}_{statistic}"] = np.quantile(kl, level, axis=0)
    return matrices
