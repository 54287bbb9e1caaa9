"""SCE: select by variance, calculate weights, erase minority signs. Wan et al. 2024 (FuseChat), arXiv:2408.07990."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simmerge_ray.plans.operators.consensus import agreeing_sum, elect
from simmerge_ray.plans.operators.masks import largest, masked
from simmerge_ray.plans.operators.sphere import inner_product
from simmerge_ray.plans.operators.task_vectors import task_vectors, weighted_sum


def select(vectors: Sequence[Tensor], share: float) -> list[Tensor]:
    """Task vectors with all but the `int(share * n)` entries of largest variance over the sources set to zero.

    n counts the entries whose variance is not 0.
    """
    count = len(vectors)
    mean = weighted_sum(vectors, [1.0] * count) / count
    variance = torch.zeros_like(mean)
    for vector in vectors:
        variance += (vector - mean).square() / count
    mask = largest(variance, int(int(torch.count_nonzero(variance)) * share))
    return [masked(vector, mask) for vector in vectors]


def sce(
    base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], *, select_topk: float = 1.0
) -> Tensor:
    """`base + sum_agreeing(w_i v_i) / sum_agreeing(w_i)` with `w_i = mean(v_i^2)` and v_i the selected task vectors.

    Signs are elected by the plain sum of the v_i; the weights of the sources are not used.

    select_topk: share of the entries (of those that differ between sources) that is selected; 1 selects all.
    """
    base, vectors = task_vectors("sce", base, tensors, weights)
    if select_topk < 1.0:
        vectors = select(vectors, select_topk)
    energies = [inner_product(vector, vector) for vector in vectors]
    # Relative to the largest, so that float32 does not lose the weights of small task vectors.
    relative = [energy / max(energies) if max(energies) > 0 else 1.0 for energy in energies]
    return base + agreeing_sum(vectors, relative, elect(vectors, [1.0] * len(vectors)), normalize=True)
