"""What the headers of a checkpoint say, as far as a merge needs it, and whether checkpoints fit each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from simmerge_ray.base.errors import CheckpointError, InputError
from simmerge_ray.checkpoints.compatibility import (
    ARCHITECTURE_KEYS,
    config_problems,
    tokenizer_problems,
    unsupported_problems,
)
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef, read_config
from simmerge_ray.checkpoints.tokenizers import tokenizer_files
from simmerge_ray.merging.graph import Node, OutputTensor, Read
from simmerge_ray.merging.mergekit.documents import DTYPES_BY_NAME, MergekitDocument, ModelName
from simmerge_ray.merging.mergekit.modules import module_of, present_names
from simmerge_ray.plans.operators.gradients import split_layer

HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "shared.weight")
# Models of several depths may be stacked, and another vocabulary has a remedy of its own.
_FREE_KEYS = ("num_hidden_layers", "n_layer", "vocab_size", "tie_word_embeddings")
_ARCHITECTURE_KEYS = [key for key in ARCHITECTURE_KEYS if key not in _FREE_KEYS]
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
    """A checkpoint (`ref`), or the result of a document (without). Without tensors it could not be read.

    is_overridden: the file names another architecture than its `config.json`, whose `model_type` then says nothing.
    """

    id: str
    tensors: Mapping[str, TensorValue]
    config: Mapping[str, Any]
    ref: CheckpointRef | None = None
    has_tokenizer: bool = False
    problems: tuple[str, ...] = field(default=())
    is_overridden: bool = False

    @cached_property
    def stacks(self) -> dict[str, dict[int, list[str]]]:
        """Suffixes of the tensors of each layer, by the prefix of the stack and the layer's number."""
        stacks: dict[str, dict[int, list[str]]] = {}
        for name in self.tensors:
            if parts := split_layer(name):
                stacks.setdefault(parts[0], {}).setdefault(parts[1], []).append(parts[2])
        return stacks

    def named_like(self, first: LoadedModel | None) -> LoadedModel:
        """The model with the names of another's tensors, where only the layout of names is another."""
        if first is None or first.tensors.keys() == self.tensors.keys() or "vision_config" not in self.config:
            return self
        own, theirs = present_names(self.tensors), present_names(first.tensors)
        if own.keys() != theirs.keys():
            return self
        return replace(self, tensors={theirs[present]: self.tensors[name] for present, name in own.items()})

    @property
    def has_own_head(self) -> bool:
        """Whether it stores a head that is not its embeddings."""
        return not is_tied(self.config) and any(name.endswith(HEAD) for name in self.tensors)

    def outside_layers(self, tied: bool) -> list[str]:
        """Tensors of no layer; with them the head of a tied model of text, for an output that is not `tied`."""
        names = [name for name in self.tensors if split_layer(name) is None]
        return names if tied or HEAD in names or self.stored(HEAD) is None else [*names, HEAD]

    def only(self, module: str) -> LoadedModel:
        """The tensors of one module."""
        which = module_of(self.config, self.tensors)
        return replace(self, tensors={name: value for name, value in self.tensors.items() if which(name) == module})

    def stored(self, name: str) -> TensorValue | None:
        """A tensor by name; the embeddings for a head that is tied to them and not stored."""
        if name in self.tensors or not name.endswith(HEAD) or not is_tied(self.config):
            return self.tensors.get(name)
        return next((value for key, value in self.tensors.items() if key.endswith(_EMBEDDINGS)), None)

    @property
    def num_layers(self) -> int:
        """Layers of the deepest stack."""
        return max((max(layers) + 1 for layers in self.stacks.values()), default=0)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is the matrix of the embeddings, as `config.json` says (in it, or for a tower of text)."""
    text = config.get("text_config")
    own = config.get("tie_word_embeddings")
    return bool(text.get("tie_word_embeddings", own) if isinstance(text, Mapping) else own)


def untie(config: dict[str, Any]) -> None:
    """Say in a config that ties its head to the embeddings that it does not."""
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict) and is_tied(holder):
            holder["tie_word_embeddings"] = False


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
    if name.architecture is not None:
        config = {**config, "architectures": [name.architecture]}
    try:
        has_tokenizer = bool(tokenizer_files(ref))
    except CheckpointError:
        has_tokenizer = False  # of images or sounds, or to be copied from elsewhere
    problems += unsupported_problems(ref, specs, config)
    tensors = {key: TensorValue(Read(ref.id, key), spec.shape, spec.dtype) for key, spec in specs.items()}
    return LoadedModel(name.id, tensors, config, ref, has_tokenizer, tuple(problems), name.architecture is not None)


def architecture_problems(models: Sequence[LoadedModel], vocabulary_is_made: bool = False) -> list[str]:
    """Differences in config and tokenizer that no merge may have; numbers of layers may differ between slices.

    vocabulary_is_made: the vocabulary of the merge is made of theirs, so theirs may differ.
    """
    readable = [model for model in models if model.ref is not None and model.config]
    problems = []
    for model in readable[1:]:
        first = readable[0]
        is_overridden = first.is_overridden or model.is_overridden
        keys = [key for key in _ARCHITECTURE_KEYS if key != "model_type" or not is_overridden]
        problems += config_problems((first.id, first.config), (model.id, model.config), keys)
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


def output_tensor(name: str, value: TensorValue, problems: list[str], document: MergekitDocument) -> OutputTensor:
    """The tensor with the one dtype to which all its inputs are cast first.

    Documents may ask for different ones; that is fine as long as one cast gives every input the value it should have.
    """
    asked = [document.dtype and DTYPES_BY_NAME[document.dtype], *sorted({cast or "" for _, cast in value.casts})]

    def same(stored: str, cast: str | None, candidate: str | None) -> bool:
        exact = cast is None or exact_in(stored, cast)
        return candidate == cast or (exact and (candidate is None or exact_in(stored, candidate)))

    for candidate in (*(dtype or None for dtype in asked), None):
        if all(same(stored, cast, candidate) for stored, cast in value.casts):
            # The engine widens to float32 anyway; to say so would only keep it from its faster ways.
            is_idle = candidate != "F64" and all(exact_in(stored, candidate or stored) for stored, _ in value.casts)
            return OutputTensor(name, value.shape, value.dtype, value.node, None if is_idle else candidate)
    problems.append("dtype: the documents cast their inputs to different dtypes, which one merge cannot; use one dtype")
    return OutputTensor(name, value.shape, value.dtype, value.node)
