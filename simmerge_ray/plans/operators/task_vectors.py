"""The task vector `finetuned - base`, and the checks and sums that the operators begin and end with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simmerge_ray.base.errors import OperatorError
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is float64, else float32: the dtype in which all operator arithmetic runs."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def checked_inputs(
    operator: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor | None, list[Tensor]]:
    """Base and sources in the compute dtype; the base is None for an operator that does not use it.

    Raises OperatorError: wrong number of sources or weights, no base where one is needed, or unequal shapes.
    """
    spec = OPERATOR_SPECS[operator]
    low, high = spec.min_sources, spec.max_sources
    if len(tensors) < low or (high is not None and len(tensors) > high):
        allowed = f"exactly {low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
        raise OperatorError(f"operator {operator!r} takes {allowed} checkpoint(s) beside the base, got {len(tensors)}")
    check_count(operator, "weights", weights, len(tensors))
    if spec.needs_base and base is None:
        raise OperatorError(f"operator {operator!r} works on task vectors and needs a base checkpoint; none was given")
    if not spec.uses_base:
        base = None
    named = [("base", base), *((f"checkpoint {number}", tensor) for number, tensor in enumerate(tensors, 1))]
    for name, tensor in named:
        if tensor is not None and tensor.shape != tensors[0].shape:
            raise OperatorError(
                f"operator {operator!r}: {name} has shape {tuple(tensor.shape)}, "
                f"checkpoint 1 has {tuple(tensors[0].shape)}"
            )
    dtype = compute_dtype(base, *tensors)
    return None if base is None else base.to(dtype), [tensor.to(dtype) for tensor in tensors]


def task_vectors(
    operator: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """(base, [source - base, ...]) in the compute dtype. Ilharco et al. 2023, arXiv:2212.04089."""
    base, vectors = from_base(operator, base, tensors, weights)
    assert base is not None  # `checked_inputs` has refused a missing base
    return base, vectors


def from_base(
    operator: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor | None, list[Tensor]]:
    """The same for an operator that may go without a base; then the tensors themselves."""
    base, tensors = checked_inputs(operator, base, tensors, weights)
    return base, tensors if base is None else [tensor - base for tensor in tensors]


def check_count(operator: str, name: str, values: Sequence[object], count: int) -> None:
    """Refuse a sequence that has not one value for each source."""
    if len(values) != count:
        raise OperatorError(f"operator {operator!r}: {len(values)} {name} for {count} checkpoint(s)")


def per_source(operator: str, name: str, value: float | Sequence[float], count: int) -> list[float]:
    """A parameter as one number for each source, each in the range that `specs` states; else an OperatorError."""
    values = [value] * count if isinstance(value, int | float) else list(value)
    check_count(operator, f"values of {name!r}", values, count)
    for single in values:
        if problem := OPERATOR_SPECS[operator].parameters[name].problem(single):
            raise OperatorError(f"operator {operator!r}: parameter {name!r}: {problem}")
    return values


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum_i w_i x_i`, from left to right, every product and sum rounded to the tensors' dtype."""
    total = weights[0] * tensors[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += weight * tensor
    return total
