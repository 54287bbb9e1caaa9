"""Outputs of an intermediate from those of the checkpoints that it was merged from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from simmerge_ray.signals.propagation.kernels import add_scaled
from simmerge_ray.signals.signature import TaskOutputs

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
