"""The average of task vectors brought to one norm: what is left of an average when the louder source does not win."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from simmerge_ray.plans.operators.shares import cancel, normalized
from simmerge_ray.plans.operators.sphere import gram_matrix
from simmerge_ray.plans.operators.task_vectors import task_vectors, weighted_sum


def scale_matched_linear(base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`base + n * sum_i w_i tau_i / |tau_i|`, `n = sum_i w_i |tau_i|` the mean norm, weights divided by their sum (by 1
    where it is 0).

    One tensor at a time, as nuslerp does it. Where all norms are equal it is the weighted average. A task vector that
    is 0 has no direction and adds nothing, though it counts in the mean norm. A baseline of our own (a "trivial"
    merge that a selector has to beat), not one of mergekit's methods. NAN (arXiv:2505.16148) argues for the same
    ratios, coefficients by the inverse norm; its shares sum to 1, which makes the harmonic mean of the norms of ours
    (`signals.tuning.starts.norm_matched_weights`).
    """
    base, vectors = task_vectors("scale_matched_linear", base, tensors, weights)
    shares = list(weights) if cancel(weights) else normalized("scale_matched_linear", weights)
    gram = gram_matrix(vectors)
    norms = [math.sqrt(gram[i][i]) for i in range(len(vectors))]
    mean_norm = math.fsum(share * norm for share, norm in zip(shares, norms, strict=True))
    coefficients = [mean_norm * s / norm if norm > 0 else 0.0 for s, norm in zip(shares, norms, strict=True)]
    return base + weighted_sum(vectors, coefficients)
