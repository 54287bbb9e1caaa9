"""Tensors of checkpoints, read whole with safetensors' own reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safetensors import safe_open
from torch import Tensor

from simmerge_ray.base.storage import Place
from simmerge_ray.checkpoints.headers import TensorSpec, read_headers
from simmerge_ray.checkpoints.references import CheckpointRef


class TensorReader:
    """Reads named tensors of one checkpoint; keeps its files open, holds no tensor."""

    def __init__(self, ref: CheckpointRef) -> None:
        self.specs: Mapping[str, TensorSpec] = read_headers(ref)
        self._handles: dict[Place, Any] = {}

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype."""
        file = self.specs[name].file
        if file not in self._handles:
            self._handles[file] = safe_open(str(file), framework="pt")
        return self._handles[file].get_tensor(name)
