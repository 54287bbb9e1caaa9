"""Multi-SLERP: weighted mean of directions on the sphere, for any number of tensors, as mergekit's `multislerp`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from simmerge_ray.plans.operators.shares import normalized
from simmerge_ray.plans.operators.sphere import combination_norm, gram_matrix
from simmerge_ray.plans.operators.task_vectors import from_base, weighted_sum

# A length from float64 inner products is exact to about 1e-8; the direction of a shorter sum is rounding errors.
_MIN_LENGTH = 1e-6


def multislerp(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    normalize: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """`sum_i w_i |x_i| * m` with `m` the direction of `sum_i w_i u_i`, `u_i = x_i / (|x_i| + eps)`.

    The method is an exponential-map step from m along the average of the u_i projected on m's tangent space. That
    average is the projection of `sum_i w_i u_i`, which is parallel to m: the step is 0, and m is the result.

    With a base it works on task vectors. Where the directions cancel out (|sum| < 1e-6), or all task vectors are 0, the
    result is the linear average. With `normalize` the weights are divided by their sum (OperatorError: it is 0) first.
    """
    base, vectors = from_base("multislerp", base, tensors, weights)
    shares = normalized("multislerp", weights) if normalize else list(weights)
    gram = gram_matrix(vectors)
    norms = [math.sqrt(gram[i][i]) for i in range(len(vectors))]
    coefficients = [share / (norm + eps) for share, norm in zip(shares, norms, strict=True)]
    length = combination_norm(gram, coefficients)
    if length < max(eps, _MIN_LENGTH):
        coefficients = shares
    else:
        mean_norm = math.fsum(share * norm for share, norm in zip(shares, norms, strict=True))
        coefficients = [mean_norm * c / length for c in coefficients]
    merged = weighted_sum(vectors, coefficients)
    return merged if base is None else base + merged
