"""Sign election: of several task vectors, keep per entry what agrees. Yadav et al. 2023 (TIES), arXiv:2306.01708."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from simmerge_ray.plans.operators.shares import cancel, normalized
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS
from simmerge_ray.plans.operators.task_vectors import task_vectors, weighted_sum


def elect(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """True where the sum of the weighted vectors is not negative (so zero elects plus); bool, shape of a vector."""
    return weighted_sum(vectors, weights) >= 0


def agreeing_sum(vectors: Sequence[Tensor], weights: Sequence[float], positive: Tensor, normalize: bool) -> Tensor:
    """`sum_i w_i v_i` over the entries whose weighted value has the elected sign; zeros agree with nothing.

    `normalize` divides each entry by the sum of the weights that agree there, where that is not 0.
    """
    total = torch.zeros_like(vectors[0])
    divisor = torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights, strict=True):
        weighted = weight * vector
        agrees = torch.where(positive, weighted > 0, weighted < 0)
        total += torch.where(agrees, weighted, 0.0)
        if normalize:
            divisor += weight * agrees.to(divisor.dtype)
    return total / torch.where(divisor != 0, divisor, 1.0) if normalize else total


def combine(
    operator: str, vectors: Sequence[Tensor], weights: Sequence[float], *, election: bool, normalize: bool
) -> Tensor:
    """What is added to the base: the elected sum (the `ties` forms) or the plain weighted sum (the `linear` forms).

    Weights that sum to 0 are not normalised: on task vectors that is a difference, or nothing at all, and no mistake.
    """
    if election:
        return agreeing_sum(vectors, weights, elect(vectors, weights), normalize)
    return weighted_sum(vectors, normalized(operator, weights) if normalize and not cancel(weights) else weights)


def sparse_sum(operator: str, sparsify: Callable[..., Sequence[Tensor]], *, election: bool) -> Callable[..., Tensor]:
    """The operator `base + scale * sum_i w_i m_i` with m_i = `sparsify(operator, task vectors, **its parameters)`.

    With `election` only entries that agree with the sign of the weighted sum are added. Its parameter `normalize`
    divides by `sum w_i`, with `election` at each entry by the weights that agree there. Defaults are those of `specs`.
    """
    defaults = {name: parameter.default for name, parameter in OPERATOR_SPECS[operator].parameters.items()}

    def merge(base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], **given: Any) -> Tensor:
        params: dict[str, Any] = defaults | given
        scale, normalize = params.pop("scale"), params.pop("normalize")
        base, vectors = task_vectors(operator, base, tensors, weights)
        sparse = sparsify(operator, vectors, **params)
        return base + scale * combine(operator, sparse, weights, election=election, normalize=normalize)

    merge.__name__ = operator
    return merge
