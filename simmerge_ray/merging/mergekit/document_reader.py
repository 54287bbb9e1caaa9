"""One mergekit document, from values of YAML to a `MergekitDocument`."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from simmerge_ray.base.errors import unknown_name
from simmerge_ray.base.storage import Place
from simmerge_ray.merging.mergekit.documents import (
    DTYPES_BY_NAME,
    MergekitDocument,
    ModelName,
    Module,
    Slice,
    Source,
    parse_model_name,
)
from simmerge_ray.merging.mergekit.methods import METHODS, Method
from simmerge_ray.merging.mergekit.problems import Problems, shorten
from simmerge_ray.merging.mergekit.settings import SettingsReader
from simmerge_ray.merging.mergekit.vocabulary_rules import read_template, read_vocabulary
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS

_DOCUMENT_KEYS = (
    "name", "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "modules",
)  # fmt: skip

_Report = Callable[[str, str], None]


class DocumentReader:
    """Reads one document; what is wrong goes to `problems`, and a harmless value takes its place."""

    def __init__(self, directory: Place, problems: Problems) -> None:
        self._directory, self._problems = directory, problems
        self._report = problems.report

    def document(self, value: object) -> MergekitDocument:
        fields = self._problems.mapping(value, "", _DOCUMENT_KEYS)
        if fields is None:
            return MergekitDocument("")
        name = fields.get("name")
        if name is not None and (not isinstance(name, str) or not name):
            self._report("name", f"{shorten(name)} is not a text")
            name = None
        method = self._method(fields)
        settings = SettingsReader(self._problems, fields["merge_method"] if method else None)
        given = [key for key in ("models", "slices", "modules") if fields.get(key) not in (None, [], {})]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            self._report("", f"exactly one of models, slices and modules is needed, {found} given")
        models, slices = self._inputs(fields, "", settings)
        document = MergekitDocument(
            method=str(fields.get("merge_method")),
            models=models,
            slices=slices,
            modules=self._modules(fields.get("modules"), settings),
            base_model=self._model(fields["base_model"], "base_model") if fields.get("base_model") else None,
            parameters=settings.parameters(fields.get("parameters"), "parameters", "document"),
            dtype=self._dtype(fields.get("dtype"), "dtype"),
            out_dtype=self._dtype(fields.get("out_dtype"), "out_dtype"),
            tokenizer_source=self._tokenizer_source(fields),
            vocabulary=read_vocabulary(fields.get("tokenizer"), self._problems, self._model),
            chat_template=read_template(fields.get("chat_template"), self._directory, self._report),
            name=name,
        )
        if method is not None and len(given) == 1:
            for place, part in document.parts():
                _check_structure(part, method, place, self._report)
        return replace(document, ignored=tuple(self._problems.ignored))

    def _inputs(
        self, fields: Mapping[str, Any], root: str, settings: SettingsReader
    ) -> tuple[tuple[Source, ...], tuple[Slice, ...]]:
        models = self._sources(fields.get("models"), f"{root}models", settings, with_range=False)
        place = f"{root}slices"
        pieces = self._problems.list_of(fields.get("slices"), place)
        return models, tuple(self._slice(piece, f"{place}[{i}]", settings) for i, piece in enumerate(pieces))

    def _modules(self, value: object, settings: SettingsReader) -> tuple[Module, ...]:
        if value is None:
            return ()
        if not isinstance(value, Mapping):
            self._report("modules", f"a mapping is needed, got {shorten(value)}")
            return ()
        modules = []
        for name, inner in value.items():
            place = f"modules.{str(name)[:100]}"
            fields = self._problems.mapping(inner, place, ("models", "slices", "parameters"))
            if fields is None:
                continue
            if bool(fields.get("models")) == bool(fields.get("slices")):
                self._report(place, "either models or slices are needed")
            models, slices = self._inputs(fields, f"{place}.", settings)
            parameters = settings.parameters(fields.get("parameters"), f"{place}.parameters", "slice")
            modules.append(Module(str(name), models, slices, parameters))
        return tuple(modules)

    def _method(self, fields: Mapping[str, Any]) -> Method | None:
        name = fields.get("merge_method")
        if name is None:
            self._report("merge_method", f"is missing; known: {', '.join(METHODS)}")
        elif not isinstance(name, str) or name not in METHODS:
            self._report("merge_method", unknown_name("method", str(name), METHODS))
        else:
            return METHODS[name]
        return None

    def _slice(self, value: object, place: str, settings: SettingsReader) -> Slice:
        fields = self._problems.mapping(value, place, ("sources", "base_model", "parameters"))
        if fields is None:
            return Slice(())
        if not fields.get("sources"):
            self._report(f"{place}.sources", "is missing or empty")
        base = fields.get("base_model")
        return Slice(
            self._sources(fields.get("sources"), f"{place}.sources", settings, with_range=True),
            self._model(base, f"{place}.base_model") if base else None,
            settings.parameters(fields.get("parameters"), f"{place}.parameters", "slice"),
        )

    def _sources(self, value: object, place: str, settings: SettingsReader, with_range: bool) -> tuple[Source, ...]:
        sources: list[Source] = []
        for index, item in enumerate(self._problems.list_of(value, place)):
            where = f"{place}[{index}]"
            keys = ("model", "layer_range", "parameters") if with_range else ("model", "parameters")
            fields = self._problems.mapping(item, where, keys)
            if fields is None:
                continue
            if "model" not in fields:
                self._report(f"{where}.model", "is missing")
                continue
            layers = self._layer_range(fields.get("layer_range"), f"{where}.layer_range") if with_range else None
            model = self._model(fields["model"], f"{where}.model")
            parameters = settings.parameters(fields.get("parameters"), f"{where}.parameters", "source")
            if model in [source.model for source in sources]:
                self._report(f"{where}.model", f"{model.id!r} is given twice")
            sources.append(Source(model, layers, parameters))
        return tuple(sources)

    def _layer_range(self, value: object, place: str) -> tuple[int, int] | None:
        numbers = value if isinstance(value, list) else []
        if len(numbers) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
            self._report(place, f"two whole numbers [begin, end) are needed, got {shorten(value)}")
            return None
        if not 0 <= numbers[0] < numbers[1]:
            self._report(place, f"{shorten(value)} is empty; the rule is 0 <= begin < end")
            return None
        return numbers[0], numbers[1]

    def _model(self, value: object, place: str) -> ModelName:
        try:
            if isinstance(value, str):
                return parse_model_name(value, self._directory)
            if isinstance(value, Mapping):
                return self._model_mapping(value, place)
            self._report(place, f"the name of a model is needed, got {shorten(value)}")
        except ValueError as error:
            self._report(place, str(error))
        return ModelName(f"?{place}")  # not equal to any other

    def _model_mapping(self, value: Mapping[Any, Any], place: str) -> ModelName:
        """The long form, `{model: {path, revision}, lora: {path, revision}}`, where text would be ambiguous."""
        fields = self._problems.mapping(value, place, ("model", "lora", "override_architecture")) or {}
        architecture = fields.get("override_architecture")
        if not isinstance(architecture, str | None):
            raise ValueError(f"override_architecture is the name of a class, got {shorten(architecture)}")
        names: list[tuple[str | None, str | None]] = []
        for key in ("model", "lora"):
            part = fields.get(key)
            if isinstance(part, str):
                name = parse_model_name(part)
                if name.adapter is not None:
                    raise ValueError(f"{part!r}: the adapter is given under 'lora'")
                names.append((name.model, name.revision))
            elif part is None and key == "lora":
                names.append((None, None))
            else:
                inner = self._problems.mapping(part, f"{place}.{key}", ("path", "revision")) or {"path": "?"}
                path, revision = inner.get("path"), inner.get("revision")
                if not isinstance(path, str) or not path or not isinstance(revision, str | None):
                    raise ValueError(f"path and revision are texts, got {shorten(part)}")
                names.append((path, revision or None))
        (model, revision), (adapter, adapter_revision) = names
        return ModelName(str(model), revision, adapter, adapter_revision, architecture, self._directory)

    def _dtype(self, value: object, place: str) -> str | None:
        if value is None:
            return None
        name = str(value).removeprefix("torch.")
        if name not in DTYPES_BY_NAME:
            self._report(place, unknown_name("dtype", reprlib.repr(name)[1:-1], DTYPES_BY_NAME))
            return None
        return name

    def _tokenizer_source(self, fields: Mapping[str, Any]) -> str | ModelName | None:
        place, value = "tokenizer_source", fields.get("tokenizer_source")
        if fields.get("tokenizer") is not None:
            if value is not None:
                self._report("tokenizer", "give either tokenizer or tokenizer_source")
            inner = fields["tokenizer"]
            # Without a source it is the union there.
            place, value = "tokenizer.source", inner.get("source", "union") if isinstance(inner, Mapping) else inner
        return value if value is None or value in ("base", "union") else self._model(value, place)


def _check_structure(document: MergekitDocument, method: Method, root: str, report: _Report) -> None:
    """Report what does not fit."""
    pieces = document.slices or (Slice(document.models),)
    if document.tokenizer_source == "base" and document.base_model is None:
        report("tokenizer_source", "'base' needs base_model")
    for index, piece in enumerate(pieces):
        place = root + (f"slices[{index}]" if document.slices else "models")
        sources = [source.model for source in piece.sources]
        base = piece.base_model or document.base_model
        if base is None and method.base in ("required", "first"):
            report("base_model", f"is missing; {document.method} needs it")
        elif base is not None and base not in sources:
            if document.slices and method.base != "none":
                report(place, f"base_model {base.id!r} must be among the sources of the slice, with its layers")
            sources += [base] if not document.slices else []
        count = len([source for source in sources if source != base or not method.base_is_apart])
        _check_count(document, method, place, count, report)
        for name, parameter in method.parameters.items():
            if parameter.required:
                _check_given(document, piece, base, name, place, report)


def _check_count(document: MergekitDocument, method: Method, place: str, count: int, report: _Report) -> None:
    besides = " besides the base" if method.base_is_apart else ""
    fewest = max(method.min_sources, OPERATOR_SPECS[document.method].min_sources)
    if count < fewest:
        report(place, f"{document.method} needs at least {fewest} models{besides}, got {count}")
    elif method.max_sources is not None and count > method.max_sources:
        added = " (a base_model that is not listed is added)" if method.base == "none" and document.models else ""
        report(place, f"{document.method} takes at most {method.max_sources} models{besides}, got {count}{added}")


def _check_given(
    document: MergekitDocument, piece: Slice, base: ModelName | None, name: str, place: str, report: _Report
) -> None:
    """A required parameter that no level gives at all; what filters leave out is seen at the tensors."""
    method = METHODS[document.method]
    if name in document.parameters or name in piece.parameters:
        return
    if not method.parameters[name].per_source:
        report(f"parameters.{name}", f"is missing; {document.method} needs it")
        return
    parts = place if document.models else f"{place}.sources"
    for index, source in enumerate(piece.sources):
        if name not in source.parameters and not (method.base_is_apart and source.model == base):
            report(f"{parts}[{index}].parameters.{name}", f"is missing; {document.method} needs it")
    if document.models and not method.base_is_apart and base and base not in [s.model for s in piece.sources]:
        report(
            f"parameters.{name}",
            f"is missing for {base.id!r}: with {document.method} mergekit adds the base_model to the models; "
            "leave base_model out, or list it with its own value",
        )
