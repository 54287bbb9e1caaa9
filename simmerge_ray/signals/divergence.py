"""KL divergence of next-token distributions, all pairs at once."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 14


def pairwise_kl(log_probs: Tensor, reference: Tensor) -> Tensor:
    """`KL(P_i || P_j) = sum_v P_i(v) (log P_i(v) - log P_j(v))` in nats, per token, by one matrix product.

    With `A_ij = sum_v P_i(v) c_j(v)`, `c_j = log P_j - log R` for any reference R and `s_i = sum_v P_i(v)`,

        KL_ij = A_ii - A_ij - s_i + s_j.

    Subtracting the reference changes nothing exactly, and in float32 it removes the cancellation between two large
    cross-entropies when R is near (the common base). The sums s are 1 up to the rounding of the log-probabilities; with
    them that rounding enters only at second order (the divergence of unnormalised distributions).

    Args:
        log_probs: (M, T, V) float32 log-probabilities of M checkpoints.
        reference: (T, V) log-probabilities to centre on, the base's where there is one.

    Returns:
        (T, M, M) float64, entry [t, i, j] = KL(P_i || P_j) at token t; >= 0, the diagonal exactly 0.

    Raises:
        ValueError: shapes that do not fit.
    """
    if log_probs.dim() != 3 or reference.shape != log_probs.shape[1:]:
        raise ValueError(
            f"log_probs {tuple(log_probs.shape)} must be (M, T, V), reference {tuple(reference.shape)} (T, V)"
        )
    num_checkpoints, num_tokens, vocabulary = log_probs.shape
    cross = torch.zeros(num_tokens, num_checkpoints, num_checkpoints, dtype=torch.float64)
    sums = torch.zeros(num_tokens, num_checkpoints, dtype=torch.float64)
    # float64 over blocks of the vocabulary: with a float32 exp, a KL of 1e-4 is wrong by 4e-4 of itself.
    for start in range(0, vocabulary, _BLOCK):
        piece = log_probs[:, :, start : start + _BLOCK].permute(1, 0, 2).double()  # (T, M, block)
        probabilities = piece.exp()
        centred = piece - reference[:, None, start : start + _BLOCK].double()
        cross += probabilities @ centred.transpose(1, 2)
        sums += probabilities.sum(-1)
    own = torch.diagonal(cross, dim1=1, dim2=2) - sums
    divergence = (own[:, :, None] - cross + sums[:, None, :]).clamp_min(0.0)
    divergence.diagonal(dim1=1, dim2=2).zero_()
    return divergence


def entropy(log_probs: Tensor) -> Tensor:
    """`-sum_v P(v) log P(v)` in nats. (..., V) -> (...) float64."""
    return -(log_probs.exp() * log_probs).sum(-1, dtype=torch.float64)
