"""What the headers of a checkpoint say, as far as a merge needs it, and whether checkpoints fit each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from simmerge_ray.base.errors import InputError
from simmerge_ray.checkpoints.compatibility import (
    ARCHITECTURE_KEYS,
    config_problems,
    tokenizer_problems,
    unsupported_problems,
)
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef, read_config
from simmerge_ray.checkpoints.tokenizers import tokenizer_files
from simmerge_ray.merging.graph import Node, Read
from simmerge_ray.merging.mergekit.documents import ModelName
from simmerge_ray.plans.operators.gradients import split_layer

# Models of several depths may be stacked, and another vocabulary has a remedy of its own.
_ARCHITECTURE_KEYS = [key for key in ARCHITECTURE_KEYS if key not in ("num_hidden_layers", "n_layer", "vocab_size")]
_VOCABULARY_REMEDY = "for different vocabularies give tokenizer_source: union (or base, or one of the models)"
# Every value of the first is a value of the second.
_EXACT = {("F16", "F32"), ("BF16", "F32"), ("F16", "F64"), ("BF16", "F64"), ("F32", "F64")}


def exact_in(stored: str, dtype: str) -> bool:
    """Whether a cast changes no value."""
    return stored == dtype or (stored, dtype) in _EXACT


@dataclass(frozen=True)
class TensorValue:
    """A tensor that can be an input: how it is made, its shape and dtype.

    casts: for every tensor read, its stored dtype and the one to which the document that reads it casts it (or None).
    """

    node: Node
    shape: tuple[int, ...]
    dtype: str
    casts: frozenset[tuple[str, str | None]] = frozenset()


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint (`ref`), or the result of a document (without). Without tensors it could not be read."""

    id: str
    tensors: Mapping[str, TensorValue]
    config: Mapping[str, Any]
    ref: CheckpointRef | None = None
    has_tokenizer: bool = False
    problems: tuple[str, ...] = field(default=())

    @cached_property
    def stacks(self) -> dict[str, dict[int, list[str]]]:
        """Suffixes of the tensors of each layer, by the prefix of the stack and the layer's number."""
        stacks: dict[str, dict[int, list[str]]] = {}
        for name in self.tensors:
            if parts := split_layer(name):
                stacks.setdefault(parts[0], {}).setdefault(parts[1], []).append(parts[2])
        return stacks

    @property
    def num_layers(self) -> int:
        """Layers of the deepest stack."""
        return max((max(layers) + 1 for layers in self.stacks.values()), default=0)


def read_model(name: ModelName, locate: Callable[[ModelName], CheckpointRef]) -> LoadedModel:
    """Headers, config and tokenizer of a checkpoint; what cannot be read is in `problems`."""
    problems: list[str] = []

    def attempt(read: Callable[[CheckpointRef], Any], ref: CheckpointRef, default: Any) -> Any:
        try:
            return read(ref)
        except (ValueError, KeyError, AttributeError, TypeError) as error:  # InputError is a ValueError
            message = str(error) if isinstance(error, InputError) else f"{ref.path} is damaged: {error}"
            problems.append(message)
            return default

    try:
        ref = locate(name)
    except (InputError, OSError) as error:
        return LoadedModel(name.id, {}, {}, problems=(f"model {name.id!r}: {error}",))
    specs, config = attempt(read_headers, ref, {}), attempt(read_config, ref, {})
    has_tokenizer = bool(attempt(tokenizer_files, ref, []))
    problems += unsupported_problems(ref, specs, config)
    tensors = {key: TensorValue(Read(ref.id, key), spec.shape, spec.dtype) for key, spec in specs.items()}
    return LoadedModel(name.id, tensors, config, ref, has_tokenizer, tuple(problems))


def architecture_problems(models: Sequence[LoadedModel], vocabulary_is_made: bool = False) -> list[str]:
    """Differences in config and tokenizer that no merge may have; numbers of layers may differ between slices.

    vocabulary_is_made: the vocabulary of the merge is made of theirs, so theirs may differ.
    """
    readable = [model for model in models if model.ref is not None and model.config]
    problems = []
    for model in readable[1:]:
        first = readable[0]
        problems += config_problems((first.id, first.config), (model.id, model.config), _ARCHITECTURE_KEYS)
        if vocabulary_is_made:
            continue
        sizes = model.config.get("vocab_size"), first.config.get("vocab_size")
        if sizes[0] != sizes[1]:
            problems.append(
                f"vocab_size: {model.id!r} has {sizes[0]!r}, {first.id!r} has {sizes[1]!r}; {_VOCABULARY_REMEDY}"
            )
        elif model.ref and first.ref and model.has_tokenizer and first.has_tokenizer:
            problems += tokenizer_problems(first.ref, model.ref)
    return problems
