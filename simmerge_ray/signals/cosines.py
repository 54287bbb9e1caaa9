"""Cosine similarity of activations and attention rows, all pairs at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simmerge_ray.signals.features import layer_thirds

_MIN_NORM = 1e-12


def pairwise_cosine(vectors: Tensor) -> Tensor:
    """Cosines of all pairs of checkpoints, row by row.

    Args:
        vectors: (M, ..., D): for each of M checkpoints the same rows of length D. A zero row has cosine 0 with all.

    Returns:
        (..., M, M) of the same dtype, diagonal exactly 1, entries in [-1, 1].
    """
    unit = torch.movedim(vectors, 0, -2)  # (..., M, D)
    unit = unit / torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp_min(_MIN_NORM)
    cosine = unit @ unit.transpose(-1, -2)
    cosine = (0.5 * (cosine + cosine.transpose(-1, -2))).clamp(-1.0, 1.0)  # a product is not quite symmetric
    cosine.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return cosine


def cosine_statistics(layers: Sequence[Tensor]) -> dict[str, Tensor]:
    """Statistics over all layers and rows, and means over the early, middle and late third of the layers.

    Args:
        layers: cosines of all pairs, (rows, M, M) float64 of each layer, of at least one row.

    Returns:
        `mean`, `sd`, `min`, `early`, `middle`, `late`, each (M, M).
    """
    rows = sum(map(len, layers))
    mean = torch.stack([layer.sum(0) for layer in layers]).sum(0) / rows
    square = torch.stack([layer.square().sum(0) for layer in layers]).sum(0) / rows
    means = torch.stack([layer.mean(0) for layer in layers])
    lowest = torch.stack([layer.amin(0) for layer in layers]).amin(0)
    statistics = {"mean": mean, "sd": (square - mean.square()).clamp_min(0.0).sqrt(), "min": lowest}
    return statistics | {third: means[chosen].mean(0) for third, chosen in layer_thirds(len(layers)).items()}
