"""Operators as the laws of operators and of the engine call them, and tensors to call them on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simmerge_ray.plans.operators.specs import OPERATOR_SPECS
from simmerge_ray.plans.operators.table import OPERATORS


def two_way(
    name: str,
    base: Tensor | None,
    left: Tensor,
    right: Tensor,
    *,
    weight: float = 0.5,
    seeds: Sequence[int] | None = None,
    **params: Any,
) -> Tensor:
    """The operator on two tensors with weights `2 (1 - weight)` and `2 weight`, so that 0.5 is a weight of 1 for each.

    Task arithmetic at 0.5 is then the usual sum of both task vectors; averages depend on the ratio only.

    Args:
        seeds: of left and right, for random operators; others ignore them.
    """
    if OPERATOR_SPECS[name].random:
        params["seeds"] = seeds
    return OPERATORS[name](base, [left, right], [2.0 * (1.0 - weight), 2.0 * weight], **params)


def tensors(shape: tuple[int, ...], seed: int = 0, count: int = 2) -> list[torch.Tensor]:
    """A base and fine-tunes near it, float64."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [base, *(base + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count))]


def seeded(name: str, count: int, first: int = 11) -> dict[str, list[int]]:
    return {"seeds": list(range(first, first + count))} if OPERATOR_SPECS[name].random else {}


def apply(name, base, sources, weights=None, seed=11, **params) -> torch.Tensor:
    weights = [1.0] * len(sources) if weights is None else weights
    return OPERATORS[name](base, sources, weights, **seeded(name, len(sources), seed), **params)


def assert_same(result: torch.Tensor, expected: torch.Tensor | np.ndarray) -> None:
    # float64 rounding of a few sums over at most 2112 entries
    np.testing.assert_allclose(result.numpy(), np.asarray(expected), rtol=1e-11, atol=1e-11)
