"""Documents -> merge graph: for every output tensor the tree of operators with plain numbers.

Gradients, filters, precedence, slices and references between documents are resolved here, from the headers of the
checkpoints alone, and every problem that they show is reported in one message.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from simmerge_ray.base.errors import CheckpointError, PlanError
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.graph import FLOAT_DTYPES, Apply, MergeGraph, Node, Read, promoted, with_dtype
from simmerge_ray.merging.mergekit.document_vocabulary import DocumentVocabulary, made_files, make_vocabulary
from simmerge_ray.merging.mergekit.documents import (
    DTYPES_BY_NAME,
    MergekitDocument,
    ModelName,
    Slice,
    Source,
    documents_text,
)
from simmerge_ray.merging.mergekit.methods import METHODS
from simmerge_ray.merging.mergekit.models import (
    HEAD,
    LoadedModel,
    TensorValue,
    architecture_problems,
    exact_in,
    is_tied,
    output_tensor,
    read_model,
    untie,
)
from simmerge_ray.merging.mergekit.modules import WHOLE, module_names, set_num_layers
from simmerge_ray.merging.mergekit.numbers import Numbers
from simmerge_ray.merging.mergekit.problems import raise_problems
from simmerge_ray.plans.operators.gradients import OUTSIDE_LAYERS, layer_position

Locate = Callable[[ModelName], CheckpointRef]

_EMBEDDING_MARKS = ("embed", "wte", "wpe")


def compile_mergekit(
    documents: Sequence[MergekitDocument], locate: Locate, round_intermediates: bool = False
) -> MergeGraph:
    """Compile the last document, the documents that it names inlined.

    `locate` finds the checkpoint of a name; it may raise `InputError` (a ValueError) where there is none.
    `round_intermediates` rounds the results of inner documents to their output dtype, as mergekit does, which writes
    them to disk; else they stay float32, and a `dtype` of the outer document does not touch them.

    Raises PlanError: everything that keeps the merge from being computed, one a line.
    """
    by_name = {document.name: document for document in documents if document.name is not None}
    if not documents:
        raise PlanError("no document to compile")
    target = documents[-1]
    compiler = _Compiler(documents, locate, round_intermediates)
    model = compiler.document(target)
    vocabulary = compiler.vocabulary
    problems = [*compiler.problems, *architecture_problems(list(compiler.loaded.values()), vocabulary is not None)]
    tokenizer_from = compiler.tokenizer_from(target)
    outputs = [output_tensor(name, value, problems, target) for name, value in sorted(model.tensors.items())]
    raise_problems([*problems, *compiler.tensor_problems()], "this merge cannot be computed:")
    checkpoints = {loaded.ref.id: loaded.ref for loaded in compiler.loaded.values() if loaded.ref}
    text = documents_text(compiler.used_documents(), lambda name: name if name.model in by_name else _absolute(name))
    return MergeGraph(
        outputs=tuple(outputs),
        checkpoints=checkpoints,
        config=with_dtype(vocabulary.config(model.config) if vocabulary else model.config, outputs),
        tokenizer_from=tokenizer_from,
        tokenizer_files=made_files(target, vocabulary, checkpoints, tokenizer_from),
        layouts=vocabulary.layouts if vocabulary else {},
        members=tuple(dict.fromkeys(compiler.members)),
        title="; ".join(_title(document) for document in compiler.used_documents()),
        description={"mergekit": text},
        mergekit=None if any(_has_ours(document) for document in compiler.used_documents()) else text,
        warnings=(*(line for document in documents for line in document.ignored), *compiler.missing(tokenizer_from)),
    )


def _has_ours(document: MergekitDocument) -> bool:
    """Whether it sets a parameter that mergekit does not have."""
    ours = {name for name, parameter in METHODS[document.method].parameters.items() if parameter.is_ours}
    return any(
        ours & parameters.keys()
        for _, part in document.parts()
        for parameters in (part.parameters, *(piece.parameters for piece in part.slices))
    )


def _absolute(name: ModelName) -> ModelName:
    """The name with paths of directories that exist made absolute: the text is kept in another directory."""
    path, adapter = name.path, name.adapter_path
    return replace(
        name,
        model=str(path.resolve()) if path.is_dir() else name.model,
        adapter=str(adapter.resolve()) if adapter is not None and adapter.is_dir() else name.adapter,
    )


def _title(document: MergekitDocument) -> str:
    names = " + ".join(dict.fromkeys(source.model.id for source in document.sources()))
    return f"{f'{document.name} = ' if document.name else ''}{document.method}: {names}"


@dataclass(frozen=True)
class _Input:
    """A source of a slice, its model, and the first of its layers."""

    source: Source
    model: LoadedModel
    begin: int
    num_layers: int


@dataclass(frozen=True)
class _Piece:
    """A slice with its models; `base` is the one of the inputs that is the base, if any. step: of the document."""

    slice: Slice
    inputs: tuple[_Input, ...]
    base: ModelName | None
    step: int


class _Compiler:
    """Compiles documents, each once; collects problems, loaded checkpoints and the ids that are merged."""

    def __init__(self, documents: Sequence[MergekitDocument], locate: Locate, round_intermediates: bool) -> None:
        self._documents = {document.name: document for document in documents if document.name is not None}
        self._order = list(documents)
        self._locate = locate
        self._round = round_intermediates
        self._compiled: dict[str | None, LoadedModel] = {}
        self._open: list[str | None] = []
        self._tensor_problems: dict[str, list[str]] = {}
        self.problems: list[str] = []
        self.loaded: dict[ModelName, LoadedModel] = {}
        self.members: list[str] = []
        self.vocabulary: DocumentVocabulary | None = None

    def used_documents(self) -> list[MergekitDocument]:
        return [document for document in self._order if document.name in self._compiled]

    def tensor_problems(self) -> list[str]:
        """Problems of many tensors, one a line, with the first of them."""
        return [
            f"{message}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            for message, names in ((m, list(dict.fromkeys(n))) for m, n in self._tensor_problems.items())
        ]

    def _at(self, tensor: str, message: str) -> None:
        self._tensor_problems.setdefault(message, []).append(tensor)

    def tokenizer_from(self, document: MergekitDocument) -> str:
        """Id of the checkpoint whose tokenizer is copied: the one asked for, or the base's, or the first model's."""
        source = document.tokenizer_source
        name = source if isinstance(source, ModelName) else document.base_model or document.sources()[0].model
        if name.model in self._documents:
            return self.tokenizer_from(self._documents[name.model])
        loaded = self.model(name)
        return loaded.ref.id if loaded and loaded.ref else name.id

    def _make_vocabulary(self, document: MergekitDocument, pieces: Sequence[_Piece]) -> None:
        used = dict.fromkeys(one.source.model for piece in pieces for one in piece.inputs)
        names = dict.fromkeys(name for name in (document.base_model, *used) if name is not None)
        models = {name: self.model(name) for name in names}
        source = document.tokenizer_source
        donor = self.model(source) if isinstance(source, ModelName) else None
        if not self.problems:
            self.vocabulary = make_vocabulary(document, models, donor, len(self._order) == 1, self.problems)

    def missing(self, tokenizer_from: str) -> list[str]:
        """A warning where the checkpoint of that id has no tokenizer."""
        donors = [one for one in self.loaded.values() if one.ref and one.ref.id == tokenizer_from]
        return [
            f"{one.id!r} holds no tokenizer files, so the merge has none" for one in donors if not one.has_tokenizer
        ]

    def model(self, name: ModelName) -> LoadedModel | None:
        """The checkpoint or the document of that name, or None where it cannot be read (reported)."""
        if name.model in self._documents:
            if name.model in self._open:
                raise PlanError(f"document {name.model!r} refers to itself")
            return self.document(self._documents[name.model])
        if name not in self.loaded:
            first = next((model for model in self.loaded.values() if model.tensors), None)
            loaded = read_model(name, self._locate).named_like(first)
            self.problems += loaded.problems
            clash = next(
                (m.ref for m in self.loaded.values() if m.ref and loaded.ref and m.ref.id == loaded.ref.id), None
            )
            if clash and loaded.ref and clash.path != loaded.ref.path:
                self.problems.append(f"{clash.path} and {loaded.ref.path} have the same id {clash.id!r}")
            self.loaded[name] = loaded
        loaded = self.loaded[name]
        return loaded if loaded.tensors else None

    def document(self, document: MergekitDocument) -> LoadedModel:
        """The result of a document as a model whose tensors are trees of operators."""
        if document.name in self._compiled:
            return self._compiled[document.name]
        self._open.append(document.name)
        step = self._order.index(document) + 1
        names = [module.name for module in document.modules] or [""]
        parts: list[tuple[str, MergekitDocument, list[_Piece]]] = []
        for module, (place, part) in zip(names, document.parts(), strict=True):
            slices = part.slices or (Slice(part.models),)
            found = [self._piece(part, one, f"{place}slices[{i}]", step, module) for i, one in enumerate(slices)]
            parts.append((module, part, [piece for piece in found if piece]))
        tensors: dict[str, TensorValue] = {}
        config: dict[str, Any] = {}
        if all(len(pieces) == len(part.slices or (part.models,)) for _, part, pieces in parts):
            donor = self.model(document.base_model) if document.base_model else None
            donor = donor or self.model(document.sources()[0].model)
            assert donor is not None  # each of the pieces has its models
            self._check_modules(names, donor)
            config = copy.deepcopy(dict(donor.config))
            if any(one.model.has_own_head for _, _, pieces in parts for one in pieces[-1].inputs):
                untie(config)
            self._make_vocabulary(document, [piece for _, _, pieces in parts for piece in pieces])
            for module, part, pieces in parts:
                if part.slices:
                    _set_layers(config, module or WHOLE, pieces)
                tensors |= self._tensors(part, pieces, is_tied(config))
        self._open.pop()
        model = LoadedModel(document.name or "the last document", tensors, config)
        self._compiled[document.name] = model
        return model

    def _check_modules(self, names: Sequence[str], donor: LoadedModel) -> None:
        known = module_names(donor.config, donor.tensors) if any(names) else names
        for kind, wrong in (("are not merged", set(known) - {*names}), ("are unknown", {*names} - {*known})):
            if wrong:
                self.problems.append(
                    f"modules: {', '.join(sorted(wrong))} {kind}; this architecture has {', '.join(known)}"
                )

    def _piece(self, document: MergekitDocument, piece: Slice, where: str, step: int, module: str) -> _Piece | None:
        """The slice with its models read, a base that is not listed added to whole models, as mergekit does."""
        method = METHODS[document.method]
        base = piece.base_model or document.base_model
        sources = piece.sources
        if base is not None and not document.slices and base not in [source.model for source in sources]:
            sources = (*sources, Source(base))
        models = [self.model(source.model) for source in sources]
        if module:
            models = [model and model.only(module) for model in models]
        place = where if document.slices else where.replace("slices[0]", "models")
        inputs = []
        for number, (source, model) in enumerate(zip(sources, models, strict=True)):
            if model is None:
                continue
            if model.ref and not (method.base_is_apart and source.model == base):
                self.members.append(model.ref.id)
            begin, end = source.layer_range or (0, model.num_layers)
            if end > model.num_layers:
                rule = f"goes beyond the {model.num_layers} layers of {source.model.id!r}"
                self.problems.append(f"{place}.sources[{number}].layer_range: [{begin}, {end}] {rule}")
                continue
            if document.slices and len(model.stacks) > 1:
                stacks = ", ".join(model.stacks)
                remedy = "merge each under 'modules'"
                self.problems.append(f"{place}: {source.model.id!r} has several stacks of layers ({stacks}); {remedy}")
                continue
            inputs.append(_Input(source, model, begin, end - begin))
        if len(inputs) < len(sources):
            return None
        counts = {one.source.model.id: one.num_layers for one in inputs}
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{name!r} {count}" for name, count in counts.items())
            self.problems.append(f"{place}: all models must give the same number of layers; {shown}")
            return None
        return _Piece(piece, tuple(inputs), base, step)

    def _tensors(self, document: MergekitDocument, pieces: Sequence[_Piece], tied: bool) -> dict[str, TensorValue]:
        """Every tensor of the output: layers in the order of the slices, embeddings as the first, the rest as the last.

        mergekit's positions: 0 outside the layers, layer / (L - 1) in a slice of L layers, 1 in a slice of one.
        """
        tensors: dict[str, TensorValue] = {}

        def add(name: str, piece: _Piece, names: Sequence[str], position: float) -> None:
            if value := self._tensor(document, piece, name, names, position):
                tensors[name] = value

        for number, piece in enumerate({0: pieces[0], len(pieces) - 1: pieces[-1]}.values()):
            plain = dict.fromkeys(name for one in piece.inputs for name in one.model.outside_layers(tied))
            for name in plain:
                is_embedding = any(mark in name for mark in _EMBEDDING_MARKS)
                if len(pieces) > 1 and is_embedding != (number == 0):
                    continue
                if tied and name.endswith(HEAD) and any(name not in o.model.tensors for o in piece.inputs):
                    continue
                add(name, piece, [name] * len(piece.inputs), OUTSIDE_LAYERS)
        offset = 0
        for piece in pieces:
            for prefix in dict.fromkeys(prefix for one in piece.inputs for prefix in one.model.stacks):
                stacks = [one.model.stacks.get(prefix, {}) for one in piece.inputs]
                length = piece.inputs[0].num_layers if document.slices else max(max(s, default=-1) + 1 for s in stacks)
                for layer in range(length):
                    own = [one.begin + layer for one in piece.inputs]
                    present = [stack.get(i, ()) for stack, i in zip(stacks, own, strict=True)]
                    for suffix in dict.fromkeys(suffix for suffixes in present for suffix in suffixes):
                        names = [f"{prefix}{i}{suffix}" for i in own]
                        add(f"{prefix}{offset + layer}{suffix}", piece, names, layer_position(layer, length))
            offset += piece.inputs[0].num_layers
        return tensors

    def _tensor(
        self, document: MergekitDocument, piece: _Piece, name: str, names: Sequence[str], position: float
    ) -> TensorValue | None:
        """One output tensor from the tensors `names` of the inputs, or None with the problem reported."""
        dtype = document.dtype and DTYPES_BY_NAME[document.dtype]
        values = []
        for one, own in zip(piece.inputs, names, strict=True):
            if stored := one.model.stored(own):
                values.append(self._value(one.model, stored, dtype))
            else:
                self._at(own, f"tensors: {one.source.model.id!r} lacks some that other models have")
        if len(values) < len(names):
            return None
        if self.vocabulary is not None:
            members = [one.source.model for one in piece.inputs]
            try:
                values = self.vocabulary.laid_out(name, members, piece.base, values)
            except CheckpointError as error:
                self.problems.append(str(error))
                return None
        first = values[0]
        for one, value in zip(piece.inputs, values, strict=True):
            if value.shape != first.shape:
                sizes = f"{list(value.shape)} in {one.source.model.id!r}, {list(first.shape)}"
                self._at(name, f"shape: {sizes} in {piece.inputs[0].source.model.id!r}")
                return None
            floating = value.dtype in FLOAT_DTYPES, first.dtype in FLOAT_DTYPES
            if floating != (True, True) and value.dtype != first.dtype:
                kinds = f"{value.dtype} in {one.source.model.id!r}, {first.dtype}"
                self._at(name, f"dtype: integer tensors must be alike; {kinds} in {piece.inputs[0].source.model.id!r}")
                return None
        node = self._node(document, piece, name, names, [value.node for value in values], position)
        out = document.out_dtype or document.dtype
        result = promoted([value.dtype for value in values])
        return TensorValue(
            node,
            first.shape,
            DTYPES_BY_NAME[out] if out and result in FLOAT_DTYPES else result,
            frozenset[tuple[str, str | None]]().union(*(value.casts for value in values)),
        )

    def _value(self, model: LoadedModel, value: TensorValue, dtype: str | None) -> TensorValue:
        """A tensor as an input of a document with that `dtype`."""
        if value.dtype not in FLOAT_DTYPES:
            return value
        if model.ref is not None:
            return replace(value, dtype=dtype or value.dtype, casts=frozenset({(value.dtype, dtype)}))
        node = value.node
        if self._round:
            rounded = value.dtype
            if dtype and not exact_in(rounded, dtype):
                if rounded in ("F16", "BF16"):
                    self.problems.append(
                        f"dtype: rounding from {rounded} to {dtype} between documents is not supported"
                    )
                rounded = dtype
            if rounded == "F32" and not any("F64" in cast for cast in value.casts):
                pass  # what the engine keeps anyway
            elif isinstance(node, Apply):
                node = replace(node, round_to=rounded)
            elif isinstance(node, Read):
                node = _rounded_read(node, value, rounded)
        return replace(value, node=node, dtype=dtype or value.dtype)

    def _node(
        self,
        document: MergekitDocument,
        piece: _Piece,
        name: str,
        names: Sequence[str],
        nodes: Sequence[Node],
        position: float,
    ) -> Node:
        """The operator of the document on the inputs, its parameters as numbers."""
        method = METHODS[document.method]
        is_base = [one.source.model == piece.base for one in piece.inputs]
        order = list(range(len(nodes)))
        base: Node | None = None
        if method.base == "first":
            order.sort(key=lambda i: not is_base[i])
        elif method.base_is_apart:
            base = next((node for node, flag in zip(nodes, is_base, strict=True) if flag), None)
            order = [i for i in order if not is_base[i]]
        numbers = Numbers(
            document,
            piece.slice.parameters,
            name,
            tuple((piece.inputs[i].source, names[i]) for i in order),
            position,
            self._at,
        )
        sources = tuple(nodes[i] for i in order)
        params = numbers.params()
        if document.method == "passthrough" and not params:
            return sources[0]
        return Apply(document.method, sources, numbers.weights(params), params, base, piece.step)


def _set_layers(config: dict[str, Any], module: str, pieces: Sequence[_Piece]) -> None:
    """Write what the layers of the pieces come to into the config of the output."""

    def layers(key: str) -> list[Any]:
        kinds: list[Any] = []
        for first in (piece.inputs[0] for piece in pieces):
            holder: Any = first.model.config
            for part in key.split("."):
                holder = holder.get(part, {})
            kinds += list(holder)[first.begin : first.begin + first.num_layers]
        return kinds

    set_num_layers(config, module, sum(piece.inputs[0].num_layers for piece in pieces), layers)


def _rounded_read(read: Read, value: TensorValue, dtype: str) -> Node:
    """A tensor that a document passes through, rounded where that changes it."""
    if all(exact_in(stored, dtype) for stored, _ in value.casts):
        return read
    return Apply("passthrough", (read,), (1.0,), round_to=dtype)
