"""Weighted Karcher (Riemannian) mean on the sphere. Karcher 1977, doi:10.1002/cpa.3160300502."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from simmerge_ray.base.errors import OperatorError
from simmerge_ray.plans.operators.shares import MIN_NORM, normalized
from simmerge_ray.plans.operators.sphere import Gram, combination_dot, combination_norm, gram_matrix
from simmerge_ray.plans.operators.task_vectors import checked_inputs, weighted_sum


def mean_direction(gram: Gram, shares: Sequence[float], max_iter: int, tol: float) -> list[float] | None:
    """(N,) coefficients of the Karcher mean of unit vectors, or None where these cancel out.

    Starts at the normalised average and goes on by `m <- exp_m(sum_i s_i log_m(u_i))` until a step is shorter than
    `tol`, where `log_m(u) = angle / sin(angle) (u - cos(angle) m)`.

    gram: (N, N) inner products. shares: not negative, sum 1.
    """
    length = combination_norm(gram, shares)
    if length < tol:
        return None
    mean = [share / length for share in shares]
    for _ in range(max_iter):
        factors, along_mean = [], []
        for i, share in enumerate(shares):
            unit = [float(j == i) for j in range(len(shares))]
            cosine = min(1.0, max(-1.0, combination_dot(gram, mean, unit)))
            angle = math.acos(cosine)
            # At the mean already, or opposite to it: no direction to go.
            stays = angle < tol or math.pi - angle < tol
            factors.append(0.0 if stays else share * angle / math.sin(angle))
            along_mean.append(factors[-1] * cosine)
        step = [factor - math.fsum(along_mean) * m for factor, m in zip(factors, mean, strict=True)]
        length = combination_norm(gram, step)
        if length < tol:
            break
        mean = [math.cos(length) * m + math.sin(length) / length * s for m, s in zip(mean, step, strict=True)]
        norm = combination_norm(gram, mean)
        mean = [m / norm for m in mean]
    return mean


def karcher(
    base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], *, max_iter: int = 10, tol: float = 1e-5
) -> Tensor:
    """Karcher mean of the directions times the mean norm, both weighted; the base is not used.

    Tensors of norm 0 have no direction and count in the mean norm only. Where the directions cancel out (two opposite
    tensors of equal weight) there is no mean direction, and the result is the linear average.

    Raises OperatorError: a negative weight, or weights that sum to 0; see also `checked_inputs`.
    """
    _, tensors = checked_inputs("karcher", base, tensors, weights)
    if any(weight < 0 for weight in weights):
        raise OperatorError(f"operator 'karcher': weights must not be negative, got {tuple(weights)}")
    shares = normalized("karcher", weights)
    gram = gram_matrix(tensors)
    norms = [math.sqrt(gram[i][i]) for i in range(len(tensors))]
    used = [i for i, norm in enumerate(norms) if norm > MIN_NORM and shares[i] > 0]
    direction = None
    if used:
        cosines = [[gram[i][j] / (norms[i] * norms[j]) for j in used] for i in used]
        direction = mean_direction(cosines, normalized("karcher", [shares[i] for i in used]), max_iter, tol)
    if direction is None:
        return weighted_sum(tensors, shares)
    mean_norm = math.fsum(share * norm for share, norm in zip(shares, norms, strict=True))
    coefficients = [mean_norm * c / norms[i] for c, i in zip(direction, used, strict=True)]
    return weighted_sum([tensors[i] for i in used], coefficients)
