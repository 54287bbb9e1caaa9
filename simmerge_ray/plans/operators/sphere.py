"""Inner products of tensors seen as vectors: all that the operators on a sphere must know of their inputs.

A mean on the sphere lies in the span of its inputs. Its coefficients follow from the Gram matrix alone, so the tensors
are read once for the inner products and once for the weighted sum, and nothing else of their size is held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 1 << 20

Gram = list[list[float]]


def inner_product(left: Tensor, right: Tensor) -> float:
    """`<left, right>` in float64: near |cos| = 1 the angle is the square root of what is left, and float32 leaves
    nothing. Block by block, so that the float64 copies stay small."""
    blocks = zip(left.reshape(-1).split(_BLOCK), right.reshape(-1).split(_BLOCK), strict=True)
    return math.fsum(float(torch.dot(a.double(), b.double())) for a, b in blocks)


def gram_matrix(vectors: Sequence[Tensor]) -> Gram:
    """`<v_i, v_j>` for every pair, (N, N)."""
    upper = {(i, j): inner_product(vectors[i], vectors[j]) for j in range(len(vectors)) for i in range(j + 1)}
    return [[upper[min(i, j), max(i, j)] for j in range(len(vectors))] for i in range(len(vectors))]


def combination_dot(gram: Gram, left: Sequence[float], right: Sequence[float]) -> float:
    """`<sum_i left_i v_i, sum_j right_j v_j>`; an exact sum, so that the order of the vectors does not matter."""
    return math.fsum(a * b * gram[i][j] for i, a in enumerate(left) for j, b in enumerate(right))


def combination_norm(gram: Gram, coefficients: Sequence[float]) -> float:
    """`|sum_i c_i v_i|`."""
    return math.sqrt(max(0.0, combination_dot(gram, coefficients, coefficients)))
