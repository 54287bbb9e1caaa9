"""Task vectors as tuning needs them: added to a tensor with a coefficient, and multiplied with a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_CHUNK = 1 << 18  # elements that are float64 at a time


class TaskVector(Protocol):
    """What a member changes in one tensor."""

    def add_to(self, tensor: Tensor, coefficient: float) -> None:
        """`tensor += coefficient * tau`, in place."""
        ...

    def dot(self, gradient: Tensor) -> float:
        """`<gradient, tau>`, summed in float64."""
        ...

    def square(self) -> float:
        """`|tau|^2`, summed in float64."""
        ...


@dataclass(frozen=True)
class DenseVector:
    """A whole task vector, of the tensor's shape."""

    values: Tensor

    def add_to(self, tensor: Tensor, coefficient: float) -> None:
        tensor.add_(self.values, alpha=coefficient)

    def dot(self, gradient: Tensor) -> float:
        return _dot(gradient, self.values)

    def square(self) -> float:
        return _dot(self.values, self.values)


@dataclass(frozen=True)
class LowRankVector:
    """`scale * up @ down` of a LoRA adapter, never materialised as a whole: `<G, U D> = <U^T G, D>`.

    up: (rows, rank). down: (rank, columns).
    """

    up: Tensor
    down: Tensor
    scale: float

    def add_to(self, tensor: Tensor, coefficient: float) -> None:
        tensor.addmm_(self.up, self.down, alpha=coefficient * self.scale)

    def dot(self, gradient: Tensor) -> float:
        return self.scale * _dot(self.up.to(gradient.dtype).T @ gradient, self.down)

    def square(self) -> float:
        up, down = self.up.double(), self.down.double()
        return self.scale**2 * float(((up.T @ up) * (down @ down.T)).sum())


def _dot(left: Tensor, right: Tensor) -> float:
    """`<left, right>` in float64, in chunks: no float64 copy of a whole tensor."""
    flat = left.reshape(-1), right.reshape(-1)
    chunks = zip(*(one.split(_CHUNK) for one in flat), strict=True)
    return math.fsum(torch.stack([torch.dot(a.double(), b.double()) for a, b in chunks]).tolist())
