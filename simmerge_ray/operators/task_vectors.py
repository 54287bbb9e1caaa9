"""The task vector `finetuned - base` and the checks that every two-way operator begins with."""

from __future__ import annotations

import torch
from torch import Tensor

from simmerge_ray.errors import OperatorError


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is float64, else float32: the dtype in which all operator arithmetic runs."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def promote(operator: str, base: Tensor | None, left: Tensor, right: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Inputs in the compute dtype.

    Raises:
        OperatorError: the shapes differ.
    """
    for name, tensor in (("base", base), ("right", right)):
        if tensor is not None and tensor.shape != left.shape:
            raise OperatorError(
                f"operator {operator!r}: {name} has shape {tuple(tensor.shape)}, left has {tuple(left.shape)}"
            )
    dtype = compute_dtype(base, left, right)
    return None if base is None else base.to(dtype), left.to(dtype), right.to(dtype)


def task_vectors(operator: str, base: Tensor | None, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(base, left - base, right - base) in the compute dtype, shapes equal. Ilharco et al. 2023, arXiv:2212.04089.

    Raises:
        OperatorError: no base, or unequal shapes.
    """
    base, left, right = promote(operator, base, left, right)
    if base is None:
        raise OperatorError(f"operator {operator!r} works on task vectors and needs a base checkpoint; none was given")
    return base, left - base, right - base
