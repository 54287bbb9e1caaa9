"""Task vectors as tuning needs them: added to a tensor with a coefficient, and multiplied with a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class TaskVector(Protocol):
    """What a member changes in one tensor."""

    def add_to(self, tensor: Tensor, coefficient: float) -> None:
        """`tensor += coefficient * tau`, in place."""
        ...

    def dot(self, gradient: Tensor) -> float:
        """`<gradient, tau>`, summed in float64."""
        ...


@dataclass(frozen=True)
class DenseVector:
    """A whole task vector, of the tensor's shape."""

    values: Tensor

    def add_to(self, tensor: Tensor, coefficient: float) -> None:
        tensor.add_(self.values, alpha=coefficient)

    def dot(self, gradient: Tensor) -> float:
        return float((gradient.double() * self.values.double()).sum())


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
        projected = self.up.to(gradient.dtype).T @ gradient
        return self.scale * float((projected.double() * self.down.double()).sum())
