"""PEFT LoRA adapters, added to the weights of their model as these are read. Hu et al. 2021, arXiv:2106.09685.

The adapted tensor is `W + s B A` with `s = alpha / r` (`alpha / sqrt(r)` for rank-stabilised LoRA), in float32; only
the rows of a block are multiplied, so no adapted tensor is ever held as a whole. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from simmerge_ray.base.errors import shown_value
from simmerge_ray.base.storage import read_json_object, read_range
from simmerge_ray.checkpoints.headers import TensorSpec, read_header
from simmerge_ray.checkpoints.references import ADAPTER_CONFIG, ADAPTER_FILE, CheckpointRef

_PREFIX = "base_model.model."
# What changes weights in another way than W + s B A.
_UNSUPPORTED = {"use_dora": False, "bias": "none", "modules_to_save": None, "layer_replication": None}


@dataclass(frozen=True)
class _Pair:
    """`scale * up @ down` has the shape of the tensor; transposed where the layer stores its weight so."""

    up: np.ndarray
    down: np.ndarray
    scale: float

    def rows(self, first: int, last: int) -> np.ndarray:
        return self.scale * (self.up[first:last] @ self.down)


class LoraAdapter:
    """The low-rank changes of one adapter, by tensor of its model."""

    def __init__(self, ref: CheckpointRef, specs: Mapping[str, TensorSpec]) -> None:
        """Read the adapter of `ref` (a few MB). Raises CheckpointError: it is not supported, or does not fit."""
        self._ref = ref
        config = self._config()
        matrices = self._matrices()
        self._pairs: dict[str, _Pair] = {}
        for module in sorted({name.rsplit(".lora_", 1)[0] for name in matrices}):
            self._pairs[f"{module}.weight"] = self._pair(module, matrices, config, specs)

    def changes(self, tensor: str) -> bool:
        return tensor in self._pairs

    def factors(self, tensor: str) -> tuple[np.ndarray, np.ndarray, float]:
        """`up`, `down` and `scale` of `scale * up @ down`, which has the tensor's shape."""
        pair = self._pairs[tensor]
        return pair.up, pair.down, pair.scale

    def add_to(self, tensor: str, start: int, values: np.ndarray) -> None:
        """Add the change to `values`, the flat float32 elements of `tensor` from `start` on."""
        pair = self._pairs[tensor]
        width = pair.down.shape[1]
        first, last = start // width, -(-(start + values.size) // width)
        offset = start - first * width
        values += pair.rows(first, last).reshape(-1)[offset : offset + values.size]

    def _config(self) -> dict[str, Any]:
        assert self._ref.adapter is not None
        file = self._ref.adapter / ADAPTER_CONFIG
        if not file.exists():
            raise self._ref.error(f"{self._ref.adapter} holds no {ADAPTER_CONFIG}")
        config = read_json_object(file, self._ref.error)
        if config.get("peft_type") != "LORA":
            raise self._ref.error(
                f"adapter type {shown_value(config.get('peft_type'))} is not supported; known: 'LORA'"
            )
        for key, allowed in _UNSUPPORTED.items():
            if config.get(key) not in (allowed, None, [], False):
                raise self._ref.error(
                    f"the adapter has {key}: {shown_value(config[key])}; merge it into its model "
                    "with peft's `merge_and_unload` first"
                )
        return config

    def _matrices(self) -> dict[str, np.ndarray]:
        assert self._ref.adapter is not None
        file = self._ref.adapter / ADAPTER_FILE
        if not file.exists():
            raise self._ref.error(f"{self._ref.adapter} holds no {ADAPTER_FILE}")
        found = {}
        for name, spec in read_header(self._ref, file).items():
            if not name.startswith(_PREFIX) or ".lora_" not in name:
                raise self._ref.error(
                    f"the adapter holds {name}, which is no LoRA matrix; merge it into "
                    "its model with peft's `merge_and_unload` first"
                )
            found[name.removeprefix(_PREFIX)] = _read_matrix(spec, self._ref)
        return found

    def _pair(
        self,
        module: str,
        matrices: Mapping[str, np.ndarray],
        config: Mapping[str, Any],
        specs: Mapping[str, TensorSpec],
    ) -> _Pair:
        embedding = f"{module}.lora_embedding_A" in matrices
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        try:
            down, up = (matrices[f"{module}.{name}"] for name in names)
        except KeyError as error:
            raise self._ref.error(f"the adapter lacks {error.args[0]}") from None
        tensor = f"{module}.weight"
        if tensor not in specs:
            raise self._ref.error(f"the adapter changes {tensor}, which the model lacks")
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
            raise self._ref.error(
                f"the adapter's matrices of {tensor} have the shapes {down.shape} and {up.shape}, whose ranks differ"
            )
        rank = down.shape[0]
        alpha = _of_module(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise self._ref.error(f"the adapter's lora_alpha for {module} is {shown_value(alpha)}; it must be a number")
        scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        # (out, in) for a linear layer; an embedding, and a layer with fan_in_fan_out, store the transpose of B A.
        pair = _Pair(down.T, up.T, scale) if embedding or config.get("fan_in_fan_out") else _Pair(up, down, scale)
        shape = (pair.up.shape[0], pair.down.shape[1])
        if shape != specs[tensor].shape:
            raise self._ref.error(
                f"the adapter's change of {tensor} has shape {shape}, the tensor {specs[tensor].shape}"
            )
        return pair


def _of_module(pattern: Any, module: str, default: Any) -> Any:
    patterns = pattern if isinstance(pattern, dict) else {}
    return next((v for key, v in patterns.items() if module == key or module.endswith(f".{key}")), default)


def _read_matrix(spec: TensorSpec, ref: CheckpointRef) -> np.ndarray:
    data = read_range(spec.file, spec.begin, spec.end)
    if spec.dtype == "BF16":
        values = (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    elif spec.dtype in ("F32", "F16"):
        values = np.frombuffer(data, dtype={"F32": "<f4", "F16": "<f2"}[spec.dtype]).astype(np.float32)
    else:
        raise ref.error(f"{spec.file} has dtype {spec.dtype}; known: F32, F16, BF16")
    return values.reshape(spec.shape)
