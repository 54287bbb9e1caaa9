"""Weight signals of all pairs from Gram sums: one read of every tensor, then matrix products.

Everything is centred: on the base where there is one, else on the mean checkpoint. Uncentred float32 sums get the
distance of close fine-tunes wrong by percents; centred ones keep full precision, and the raw cosine is recovered from
`<w_i, w_j> = <c, c> + <c, d_i> + <c, d_j> + <d_i, d_j>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 16
TENSOR_KINDS = ("attention", "mlp", "embedding", "norm", "other")
_KIND_PATTERNS = (
    ("embedding", r"embed|wte|wpe|lm_head"),
    ("norm", r"norm|ln_|layernorm"),
    ("attention", r"attn|attention"),
    ("mlp", r"mlp|feed_forward|ffn|fc"),
)


def tensor_kind(name: str) -> str:
    """attention, mlp, embedding, norm or other, from a Hugging Face tensor name."""
    for kind, pattern in _KIND_PATTERNS:
        if re.search(pattern, name):
            return kind
    return "other"


@dataclass(frozen=True)
class WeightSums:
    """Sums over coordinates for M checkpoints with differences `d_i = w_i - c` from a centre c; `+` adds coordinates.

    gram: (M + 1, M + 1) float64 of [c, d_1, ..., d_M].
    sign_product: (M, M) float64, sum of sign(d_i) sign(d_j). sign_support: (M, M), coordinates where both are non-zero.
    """

    gram: Tensor
    sign_product: Tensor
    sign_support: Tensor

    @staticmethod
    def zero(num_checkpoints: int) -> WeightSums:
        size = (num_checkpoints, num_checkpoints)
        return WeightSums(
            torch.zeros(num_checkpoints + 1, num_checkpoints + 1, dtype=torch.float64),
            torch.zeros(size, dtype=torch.float64),
            torch.zeros(size, dtype=torch.float64),
        )

    def __add__(self, other: WeightSums) -> WeightSums:
        return WeightSums(
            self.gram + other.gram, self.sign_product + other.sign_product, self.sign_support + other.sign_support
        )

    def finish(self, centre_is_base: bool) -> dict[str, Tensor]:
        """Signals from the sums, each (M, M) float64.

        `cosine` and `l2` (relative to the norm of the centre) always; with a base also `task_vector_cosine`,
        `task_vector_norm_ratio` (log of left over right), `sign_conflict` (share of coordinates moved by both in
        opposite directions; 0 where none is moved by both) and `task_vector_norm` (of checkpoint i in row i, relative).
        A zero vector has cosine 0 with all and the log ratio uses the smallest float64 instead of its norm.
        """
        tiny = torch.finfo(torch.float64).tiny
        centre, cross, gram = self.gram[0, 0], self.gram[0, 1:], self.gram[1:, 1:]
        raw = centre + cross[:, None] + cross[None, :] + gram
        squares = torch.diagonal(gram).clamp_min(0.0)
        raw_norms = torch.diagonal(raw).clamp_min(tiny).sqrt()
        distance = (squares[:, None] + squares[None, :] - 2.0 * gram).clamp_min(0.0).sqrt()
        distance.fill_diagonal_(0.0)
        centre_norm = centre.clamp_min(tiny).sqrt()
        signals = {
            "cosine": (raw / (raw_norms[:, None] * raw_norms[None, :])).clamp(-1.0, 1.0),
            "l2": distance / centre_norm,
        }
        if centre_is_base:
            norms = squares.sqrt()
            products = norms[:, None] * norms[None, :]
            logs = norms.clamp_min(tiny).log()
            conflicts = 0.5 * (self.sign_support - self.sign_product)
            signals |= {
                "task_vector_cosine": torch.where(products > 0, gram / products.clamp_min(tiny), 0.0).clamp(-1.0, 1.0),
                "task_vector_norm_ratio": logs[:, None] - logs[None, :],
                "sign_conflict": conflicts / self.sign_support.clamp_min(1.0),
                "task_vector_norm": (norms / centre_norm)[:, None].expand_as(gram).clone(),
            }
        return signals


def weight_sums(checkpoints: Sequence[Tensor], base: Tensor | None) -> WeightSums:
    """Sums over one tensor, in blocks of 2^16 elements from its start; float32 products, float64 sums.

    Args:
        checkpoints: M tensors of one shape, any float dtype.
        base: the same tensor of the base, or None to centre on the mean of the checkpoints.

    Raises:
        ValueError: shapes differ, or there is no checkpoint.
    """
    if not checkpoints or len({t.shape for t in (*checkpoints, *((base,) if base is not None else ()))}) != 1:
        raise ValueError(f"need tensors of one shape, got {[tuple(t.shape) for t in checkpoints]}")
    flats = [tensor.reshape(-1) for tensor in checkpoints]
    flat_base = None if base is None else base.reshape(-1)
    total = WeightSums.zero(len(flats))
    for start in range(0, flats[0].numel(), BLOCK_ELEMENTS):
        piece = slice(start, start + BLOCK_ELEMENTS)
        rows = torch.stack([flat[piece].float() for flat in flats])
        centre = rows.mean(0) if flat_base is None else flat_base[piece].float()
        differences = rows - centre
        stacked = torch.cat((centre[None], differences))
        signs = differences.sign()
        moved = signs.abs()
        total = total + WeightSums(
            (stacked @ stacked.T).double(), (signs @ signs.T).double(), (moved @ moved.T).double()
        )
    return total
