"""The shape and the size of a model: what its `config.json` and its headers say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simmerge_ray.base.errors import ConfigError

if TYPE_CHECKING:
    from simmerge_ray.checkpoints.headers import TensorSpec

COMPUTE_BYTES = {"float32": 4, "bfloat16": 2}  # of an element, in the dtypes that engines and workers compute in
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden_size": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "vocab_size": ("vocab_size",),
}


@dataclass(frozen=True)
class ModelShape:
    """Of a decoder; whatever the family calls its parts."""

    layers: int
    hidden_size: int
    heads: int
    vocab_size: int
    head_size: int
    intermediate_size: int


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a `config.json` tells.

    Raises:
        ConfigError: a number is not there.
    """
    text = config.get("text_config") or config
    values: dict[str, int] = {}
    for part, keys in _NAMES.items():
        value = next((text[key] for key in keys if isinstance(text.get(key), int)), None)
        if value is None:
            raise ConfigError(f"config.json has no {' or '.join(keys)}")
        values[part] = value
    hidden_size, heads = values["hidden_size"], values["heads"]
    return ModelShape(
        **values,
        head_size=int(text.get("head_dim") or hidden_size // heads),
        intermediate_size=int(text.get("intermediate_size") or text.get("n_inner") or 4 * hidden_size),
    )


def num_elements(specs: Mapping[str, TensorSpec]) -> int:
    """Elements of the model's own tensors; an adapter adds none, since it is added to them."""
    return sum(math.prod(spec.shape) for spec in specs.values())
