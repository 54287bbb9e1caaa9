"""KL divergence of next-token distributions, all pairs at once."""

from __future__ import annotations

import torch
from torch import Tensor


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in float64: a float32 exp makes a KL of 1e-4 wrong by 4e-4 of itself. (..., V) -> (..., V)."""
    return torch.log_softmax(logits.double(), dim=-1)


def pairwise_kl(log_probs: Tensor) -> Tensor:
    """`KL(P_i || P_j) = sum_v P_i(v) (log P_i(v) - log P_j(v))` in nats, per token, by one matrix product.

    With `A_ij = sum_v P_i(v) c_j(v)` and `c_j = log P_j - log R` for any reference R, here the first checkpoint,

        KL_ij = A_ii - A_ij.

    Subtracting a reference that is near changes nothing exactly and removes the cancellation between two large
    cross-entropies.

    Args:
        log_probs: (M, T, V) float64 log-probabilities of M checkpoints.

    Returns:
        (T, M, M) float64, entry [t, i, j] = KL(P_i || P_j) at token t; >= 0, the diagonal exactly 0.

    Raises:
        ValueError: another shape.
    """
    if log_probs.dim() != 3:
        raise ValueError(f"log_probs {tuple(log_probs.shape)} must be (M, T, V)")
    by_token = log_probs.transpose(0, 1)  # (T, M, V)
    cross = by_token.exp() @ (by_token - by_token[:, :1]).transpose(1, 2)
    divergence = (torch.diagonal(cross, dim1=1, dim2=2)[:, :, None] - cross).clamp_min(0.0)
    divergence.diagonal(dim1=1, dim2=2).zero_()
    return divergence
