"""One mergekit document as frozen values, parameter settings evaluated at a tensor, and documents as text again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from simmerge_ray.base.storage import Place, place_in
from simmerge_ray.merging.graph import DTYPE_NAMES
from simmerge_ray.plans.operators.gradients import Scalar, gradient_value

# As safetensors names them, by mergekit's names.
DTYPES_BY_NAME: Mapping[str, str] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class ModelName:
    """A model as a file names it: `model`, `model@revision`, `model+adapter`, `model+adapter@revision`.

    architecture: a class that stands in for the one of its `config.json`. directory: that of the file; relative paths
    start there. It is no part of the identity.
    """

    model: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    architecture: str | None = None
    directory: Place = field(default=Path(), compare=False)

    @property
    def id(self) -> str:
        """The text form."""
        text = self.model + (f"@{self.revision}" if self.revision else "")
        if self.adapter is None:
            return text
        return f"{text}+{self.adapter}" + (f"@{self.adapter_revision}" if self.adapter_revision else "")

    @property
    def path(self) -> Place:
        """The directory of the model, if it is local."""
        return place_in(self.directory, self.model)

    @property
    def adapter_path(self) -> Place | None:
        """The directory of the LoRA adapter, if it is local."""
        return None if self.adapter is None else place_in(self.directory, self.adapter)


def parse_model_name(text: str, directory: Place = Path()) -> ModelName:
    """`model[@revision][+adapter[@revision]]` -> ModelName; a ValueError where a part is empty or given twice."""
    parts = text.split("+")
    if len(parts) > 2:
        raise ValueError(f"{text!r} has more than one '+'; the form is model[@revision][+adapter[@revision]]")
    names: list[str | None] = []
    for part in parts:
        name, *revision = part.split("@")
        if not name or len(revision) > 1 or revision == [""]:
            raise ValueError(f"{text!r} is not of the form model[@revision][+adapter[@revision]]")
        names += [name, revision[0] if revision else None]
    model, revision_, adapter, adapter_revision = (*names, None, None)[:4]
    return ModelName(str(model), revision_, adapter, adapter_revision, None, directory)


@dataclass(frozen=True)
class Rule:
    """Values of a parameter for tensors whose name contains `filter` (None: for all); several are a layer gradient."""

    values: tuple[Scalar, ...]
    filter: str | None = None


Setting = tuple[Rule, ...]
Parameters = Mapping[str, Setting]


def resolve(scopes: Iterable[Parameters], name: str, tensor: str, position: float) -> Scalar | None:
    """The value of a parameter for a tensor at `position` in [0, 1] of the slice, or None.

    It comes from the first of `scopes` (source, slice, document) with a rule that matches; of its rules the first does.
    """
    for parameters in scopes:
        rules = (rule for rule in parameters.get(name, ()) if rule.filter is None or rule.filter in tensor)
        if (rule := next(rules, None)) and rule.values:
            return gradient_value(rule.values, position)
    return None


@dataclass(frozen=True)
class Source:
    """A model that enters a slice, with the layers taken [begin, end); None takes all."""

    model: ModelName
    layer_range: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Layers of the output in a row, each merged from one layer of every source."""

    sources: tuple[Source, ...]
    base_model: ModelName | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class TokenRule:
    """The row of one token: that of a model (of another token there, by text or number), or zeros (`zero`).

    source: None only says that the token is there. force: for all models, also those that have the token.
    """

    source: ModelName | Literal["zero"] | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class VocabularyRules:
    """What a `tokenizer` mapping says beside its source: rules of tokens, and a size that the rows are padded to."""

    tokens: tuple[tuple[str, TokenRule], ...] = ()
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class Module:
    """One tower of a model of several, merged for itself; its parameters stand between those of slice and document."""

    name: str
    models: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class MergekitDocument:
    """One merge. Either `models` (whole) or `slices` or `modules`. Parameters carry mergekit's names.

    tokenizer_source: `base`, `union`, or a model, or None for the tokenizer of the base (else of the first model).
    chat_template: `auto`, a name, a file or the text of a template.
    """

    method: str
    models: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()
    base_model: ModelName | None = None
    parameters: Parameters = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | ModelName | None = None
    vocabulary: VocabularyRules = VocabularyRules()
    chat_template: str | None = None
    name: str | None = None
    modules: tuple[Module, ...] = ()
    ignored: tuple[str, ...] = field(default=(), compare=False)

    def parts(self) -> tuple[tuple[str, MergekitDocument], ...]:
        """The document for each of its modules, as if it had no other, with the module's place; else itself.

        Rules of the document follow those of the module: the first that matches counts.
        """
        if not self.modules:
            return (("", self),)
        parts = []
        for module in self.modules:
            names = dict.fromkeys((*module.parameters, *self.parameters))
            parameters = {n: (*module.parameters.get(n, ()), *self.parameters.get(n, ())) for n in names}
            part = replace(self, models=module.models, slices=module.slices, parameters=parameters, modules=())
            parts.append((f"modules.{module.name}.", part))
        return tuple(parts)

    def sources(self) -> tuple[Source, ...]:
        """Every model that is merged, in the order of the file."""
        wholes, pieces = list(self.models), list(self.slices)
        for module in self.modules:
            wholes += module.models
            pieces += module.slices
        return (*wholes, *(source for piece in pieces for source in piece.sources))

    def references(self) -> tuple[ModelName, ...]:
        """Every model named, in the order of the file, each once."""
        names = [source.model for source in self.sources()]
        pieces = [*self.slices, *(piece for module in self.modules for piece in module.slices)]
        names += [piece.base_model for piece in pieces if piece.base_model]
        names += [self.base_model] if self.base_model else []
        names += [self.tokenizer_source] if isinstance(self.tokenizer_source, ModelName) else []
        names += [rule.source for _, rule in self.vocabulary.tokens if isinstance(rule.source, ModelName)]
        return tuple(dict.fromkeys(names))


Rename = Callable[[ModelName], ModelName]


def documents_text(documents: Iterable[MergekitDocument], rename: Rename = lambda name: name) -> str:
    """Documents as the text of a YAML file, with the names of models passed through `rename`."""
    return yaml.safe_dump_all(
        [_document_json(document, rename) for document in documents],
        sort_keys=False,
        default_flow_style=None,
        width=120,
    )


def _document_json(document: MergekitDocument, rename: Rename) -> dict[str, Any]:
    source, rules = document.tokenizer_source, document.vocabulary
    tokenizer = _model_json(rename(source)) if isinstance(source, ModelName) else source
    has_rules = rules != VocabularyRules()
    modules = {
        module.name: _kept(
            {
                "models": [_source_json(source, rename) for source in module.models],
                "slices": [_slice_json(piece, rename) for piece in module.slices],
                "parameters": _parameters_json(module.parameters),
            }
        )
        for module in document.modules
    }
    fields = {
        "name": document.name,
        "merge_method": document.method,
        "base_model": document.base_model and _model_json(rename(document.base_model)),
        "models": [_source_json(source, rename) for source in document.models],
        "slices": [_slice_json(piece, rename) for piece in document.slices],
        "modules": modules,
        "parameters": _parameters_json(document.parameters),
        "dtype": document.dtype,
        "out_dtype": document.out_dtype,
        "tokenizer_source": None if has_rules else tokenizer,
        "tokenizer": {"source": tokenizer, **_rules_json(rules, rename)} if has_rules else None,
        "chat_template": document.chat_template,
    }
    return _kept(fields)


def _rules_json(rules: VocabularyRules, rename: Rename) -> dict[str, Any]:
    tokens = {}
    for text, rule in rules.tokens:
        source: Any = {"kind": "zero"} if rule.source == "zero" else None
        if isinstance(rule.source, ModelName):
            source = _model_json(rename(rule.source))
            if rule.token is not None or rule.token_id is not None:
                source = {"kind": "model_token", "model": source}
                source |= {"token": rule.token} if rule.token is not None else {"token_id": rule.token_id}
        tokens[text] = _kept({"source": source, "force": rule.force or None})
    return _kept({"tokens": tokens, "pad_to_multiple_of": rules.pad_to_multiple_of})


def _slice_json(piece: Slice, rename: Rename) -> dict[str, Any]:
    return _kept(
        {
            "sources": [_source_json(source, rename) for source in piece.sources],
            "base_model": piece.base_model and _model_json(rename(piece.base_model)),
            "parameters": _parameters_json(piece.parameters),
        }
    )


def _kept(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value not in (None, {}, [])}


def _source_json(source: Source, rename: Rename) -> dict[str, Any]:
    return _kept(
        {
            "model": _model_json(rename(source.model)),
            "layer_range": source.layer_range and list(source.layer_range),
            "parameters": _parameters_json(source.parameters),
        }
    )


def _model_json(name: ModelName) -> Any:
    """Text, or, where it could not be read back (a path with `+` or `@`), the mapping that mergekit also takes."""
    parts = [part for part in (name.model, name.revision, name.adapter, name.adapter_revision) if part is not None]
    if name.architecture is None and not any(sign in part for part in parts for sign in "+@"):
        return name.id
    lora = _kept({"path": name.adapter, "revision": name.adapter_revision})
    model = _kept({"path": name.model, "revision": name.revision})
    return _kept({"model": model, "lora": lora, "override_architecture": name.architecture})


def _parameters_json(parameters: Parameters) -> dict[str, Any]:
    return {name: _setting_json(setting) for name, setting in parameters.items()}


def _setting_json(setting: Setting) -> Any:
    values = [rule.values[0] if len(rule.values) == 1 else list(rule.values) for rule in setting]
    if len(setting) == 1 and setting[0].filter is None:
        return values[0]
    return [
        {"value": value} if rule.filter is None else {"filter": rule.filter, "value": value}
        for rule, value in zip(setting, values, strict=True)
    ]
