"""Cosine similarity of activations and attention rows, all pairs at once, as moments that add."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class CosineMoments:
    """Sums over rows of per-layer cosines of all pairs; `+` joins two sets of rows of the same layers.

    count: (L,) float64, rows per layer. total, total_square: (L, M, M) float64. minimum: (L, M, M) float64.
    """

    count: Tensor
    total: Tensor
    total_square: Tensor
    minimum: Tensor

    @staticmethod
    def of(cosines: list[Tensor]) -> CosineMoments:
        """Moments of one entry per layer, each (rows, M, M). A layer needs at least one row."""
        doubles = [layer.double() for layer in cosines]
        return CosineMoments(
            count=torch.tensor([float(layer.shape[0]) for layer in doubles], dtype=torch.float64),
            total=torch.stack([layer.sum(0) for layer in doubles]),
            total_square=torch.stack([layer.square().sum(0) for layer in doubles]),
            minimum=torch.stack([layer.amin(0) for layer in doubles]),
        )

    def __add__(self, other: CosineMoments) -> CosineMoments:
        return CosineMoments(
            self.count + other.count,
            self.total + other.total,
            self.total_square + other.total_square,
            torch.minimum(self.minimum, other.minimum),
        )

    def finish(self) -> dict[str, Tensor]:
        """Statistics over all layers and rows, and means over the early, middle and late third of the layers.

        Returns:
            `mean`, `sd`, `min`, `early`, `middle`, `late`, each (M, M) float64.
        """
        rows = self.count.sum()
        mean = self.total.sum(0) / rows
        variance = (self.total_square.sum(0) / rows - mean.square()).clamp_min(0.0)
        layer_means = self.total / self.count[:, None, None]
        stats = {"mean": mean, "sd": variance.sqrt(), "min": self.minimum.amin(0)}
        return stats | {third: layer_means[layers].mean(0) for third, layers in layer_thirds(len(self.count)).items()}
