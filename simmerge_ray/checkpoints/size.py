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
    """The shape that a `config.json` tells. Raises ConfigError: a number is not there."""
    text = config.get("text_config") or config

    def number(*keys: str, default: int | None = None) -> int:
        value = next((text[key] for key in keys if text.get(key) is not None), default)
        if not isinstance(value, int):
            raise ConfigError(f"config.json has no number {' or '.join(keys)}")
        return value

    layers = number("num_hidden_layers", "n_layer")
    hidden_size, heads = number("hidden_size", "n_embd"), number("num_attention_heads", "n_head")
    return ModelShape(
        layers=layers,
        hidden_size=hidden_size,
        heads=heads,
        vocab_size=number("vocab_size"),
        head_size=number("head_dim", default=hidden_size // heads),
        intermediate_size=number("intermediate_size", "n_inner", default=4 * hidden_size),
    )


def num_elements(specs: Mapping[str, TensorSpec]) -> int:
    """Elements of the model's own tensors; an adapter adds none, since it is added to them."""
    return sum(math.prod(spec.shape) for spec in specs.values())
