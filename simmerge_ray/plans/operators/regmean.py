"""The weights of a linear layer whose outputs are nearest to those of every source on its own inputs.

RegMean, Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models", arXiv:2212.09849.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simmerge_ray.base.errors import OperatorError
from simmerge_ray.plans.operators.linear import linear
from simmerge_ray.plans.operators.shares import normalized
from simmerge_ray.plans.operators.task_vectors import checked_inputs

_RANK_TOLERANCE = 1e-10  # of the largest eigenvalue; below it an input direction was never seen


def regmean(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    alpha: float = 0.9,
    grams: Sequence[Tensor] = (),
    input_axis: int = 1,
) -> Tensor:
    """`argmin_W sum_i w_i |X_i W^T - X_i W_i^T|^2` from Gram matrices `G_i = X_i^T X_i / n` whose off-diagonals are
    scaled by alpha: `W^T = (sum_i w_i G_i)^-1 sum_i w_i G_i W_i^T`, weights divided by their sum; the base is not used.

    alpha = 0 averages every input dimension by how strong it is in each source; equal Gram matrices give the average.
    What the equations leave open (inputs that are 0 in all sources) is that of the average, too. Solved in float64.

    Args:
        grams: of each source, (D, D), D inputs; none for a tensor that multiplies no inputs: the average.
        input_axis: of the tensors that stands for the inputs: 1 for (outputs, inputs), 0 for transposed layers.

    Raises:
        OperatorError: weights that sum to 0, or Gram matrices that do not fit the tensors.
    """
    _, tensors = checked_inputs("regmean", base, tensors, weights)
    average = linear(None, tensors, weights)
    if not grams:
        return average
    size = tensors[0].shape[input_axis]
    if len(grams) != len(tensors) or tensors[0].dim() != 2 or any(gram.shape != (size, size) for gram in grams):
        shapes = ", ".join(str(tuple(gram.shape)) for gram in grams)
        raise OperatorError(
            f"operator 'regmean': {len(tensors)} tensors of {tuple(tensors[0].shape)} need as many Gram matrices of "
            f"({size}, {size}), got {shapes}"
        )
    center = average.double() if input_axis == 0 else average.double().T
    total = torch.zeros((size, size), dtype=torch.float64)
    pulls = torch.zeros_like(center)
    for share, tensor, gram in zip(normalized("regmean", weights), tensors, grams, strict=True):
        scaled = share * alpha * gram.double()
        scaled.diagonal().copy_(share * gram.double().diagonal())
        total += scaled
        pulls += scaled @ ((tensor.double() if input_axis == 0 else tensor.double().T) - center)
    change = _solved(total, pulls, alpha)
    return (center + change if input_axis == 0 else (center + change).T).to(average.dtype)


def _solved(total: Tensor, pulls: Tensor, alpha: float) -> Tensor:
    """`total^-1 pulls`; directions in which `total` is 0 stay 0."""
    if alpha < 1.0:  # off-diagonals smaller than those of a Gram matrix: positive definite but for dead inputs
        diagonal = total.diagonal()
        diagonal[diagonal <= 0] = 1.0
        factor, failed = torch.linalg.cholesky_ex(total)
        if not bool(failed):
            return torch.cholesky_solve(pulls, factor)
    return torch.linalg.pinv(total, rtol=_RANK_TOLERANCE, hermitian=True) @ pulls
