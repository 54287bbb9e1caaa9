"""Text of a mergekit file -> documents. Every problem of the file is reported, in one message."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from simmerge_ray.base.errors import PlanError, unknown_name
from simmerge_ray.base.storage import Place
from simmerge_ray.merging.mergekit.documents import (
    DTYPE_NAMES,
    MergekitDocument,
    ModelName,
    Parameters,
    Rule,
    Scalar,
    Setting,
    Slice,
    Source,
    parse_model_name,
)
from simmerge_ray.merging.mergekit.methods import IGNORED_PARAMETERS, METHODS, Kind, Method
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS

_DOCUMENT_KEYS = (
    "name", "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer",
)  # fmt: skip
_REMEDIES = {
    "modules": "'modules' is not supported; merge models of one stack of layers with 'models' or 'slices'",
    "chat_template": "'chat_template' is not supported; the template comes with the tokenizer of tokenizer_source",
    "residual_weight": "'residual_weight' has no effect in mergekit either; remove it",
}
_UNION = "union is not supported; choose models with the same vocabulary, or resize them first"
_SHOWN_PROBLEMS = 40


def read_mergekit(text: str, directory: Place) -> tuple[MergekitDocument, ...]:
    """Parse one or several documents; relative paths start at `directory`.

    A document may name others as models. They come in an order in which each stands after those that it names; the
    last is the merge: the one without a name, or the last of the file.

    Raises:
        PlanError: with every problem, one a line, each with its place, e.g. `models[1].parameters.weigth`.
    """
    try:
        values = [value for value in yaml.load_all(text, _StrictLoader) if value is not None]
    except yaml.YAMLError as error:
        raise PlanError(f"not YAML: {' '.join(str(error).split())}") from None
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise PlanError(f"YAML with a value that cannot be read: {str(error) or type(error).__name__}") from None
    if not values:
        raise PlanError("the file holds no document; it needs merge_method and models or slices")
    problems: list[str] = []
    documents = []
    for index, value in enumerate(values):
        reader = _Reader(directory, problems, f"documents[{index}]" if len(values) > 1 else "")
        documents.append(reader.document(value))
    ordered = () if problems else _ordered(documents, problems)
    raise_problems(problems, "this mergekit file cannot be used:")
    return ordered


class _StrictLoader(yaml.SafeLoader):
    """YAML whose mappings have no key twice (of which only the last would count)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def raise_problems(problems: Iterable[str], title: str) -> None:
    """One PlanError with all problems, one a line; none is no error."""
    if lines := list(dict.fromkeys(problems)):
        shown = lines[:_SHOWN_PROBLEMS]
        shown += [f"and {len(lines) - _SHOWN_PROBLEMS} more"] if len(lines) > _SHOWN_PROBLEMS else []
        raise PlanError("\n  ".join([title, *shown]))


def _ordered(documents: Sequence[MergekitDocument], problems: list[str]) -> tuple[MergekitDocument, ...]:
    """The documents with those that are named before those that name them, the merge last."""
    if len(documents) == 1:
        return tuple(documents)
    unnamed = [index for index, document in enumerate(documents) if document.name is None]
    if len(unnamed) > 1:
        places = ", ".join(f"documents[{index}]" for index in unnamed)
        problems.append(f"{places}: only one document may be without 'name', the final merge")
    by_name: dict[str, MergekitDocument] = {}
    for index, document in enumerate(documents):
        if document.name in by_name:
            problems.append(f"documents[{index}].name: {document.name!r} is taken by another document")
        elif document.name is not None:
            by_name[document.name] = document
    if problems:
        return ()
    final = documents[unnamed[0]] if unnamed else documents[-1]
    done: list[MergekitDocument] = []

    def visit(document: MergekitDocument, path: tuple[str | None, ...]) -> None:
        if document in done:
            return
        if document.name in path:
            circle = " -> ".join(str(name) for name in (*path[path.index(document.name) :], document.name))
            problems.append(f"documents refer to each other in a circle: {circle}")
            return
        for reference in document.references():
            if reference.model in by_name:
                if reference.revision or reference.adapter:
                    problems.append(f"{reference.id!r}: the result of a document takes no revision and no adapter")
                visit(by_name[reference.model], (*path, document.name))
        done.append(document)

    visit(final, ())
    problems += [
        f"documents[{index}]: {document.name!r} is not used by the final merge; write it to a file of its own"
        for index, document in enumerate(documents)
        if document not in done
    ]
    return tuple(done)


def _shown(value: object) -> str:
    return reprlib.repr(value)


class _Reader:
    """Reads one document; what is wrong goes to `problems`, and a harmless value takes its place."""

    def __init__(self, directory: Place, problems: list[str], root: str) -> None:
        self._directory = directory
        self._problems = problems
        self._root = root

    def _report(self, place: str, message: str) -> None:
        place = ".".join(filter(None, (self._root, place)))
        self._problems.append(f"{place}: {message}" if place else message)

    def document(self, value: object) -> MergekitDocument:
        fields = self._mapping(value, "", _DOCUMENT_KEYS)
        if fields is None:
            return MergekitDocument("")
        name = fields.get("name")
        if name is not None and (not isinstance(name, str) or not name):
            self._report("name", f"{_shown(name)} is not a text")
            name = None
        method = self._method(fields)
        given = [key for key in ("models", "slices") if fields.get(key) not in (None, [])]
        if len(given) != 1:
            self._report("", f"exactly one of models and slices is needed, {'both' if given else 'none'} given")
        models = self._sources(fields.get("models"), "models", method, with_range=False)
        pieces = self._list(fields.get("slices"), "slices")
        slices = tuple(self._slice(piece, f"slices[{index}]", method) for index, piece in enumerate(pieces))
        document = MergekitDocument(
            method=str(fields.get("merge_method")),
            models=models,
            slices=slices,
            base_model=self._model(fields["base_model"], "base_model") if fields.get("base_model") else None,
            parameters=self._parameters(fields.get("parameters"), "parameters", method, level="document"),
            dtype=self._dtype(fields.get("dtype"), "dtype"),
            out_dtype=self._dtype(fields.get("out_dtype"), "out_dtype"),
            tokenizer_source=self._tokenizer(fields),
            name=name,
        )
        if method is not None and len(given) == 1:
            self._check_structure(document, method)
        return document

    def _method(self, fields: Mapping[str, Any]) -> Method | None:
        name = fields.get("merge_method")
        if name is None:
            self._report("merge_method", f"is missing; known: {', '.join(METHODS)}")
        elif not isinstance(name, str) or name not in METHODS:
            self._report("merge_method", unknown_name("method", str(name), METHODS))
        else:
            return METHODS[name]
        return None

    def _mapping(self, value: object, place: str, known: Iterable[str]) -> dict[str, Any] | None:
        """`value` with its known keys, the others reported; None if it is no mapping."""
        if not isinstance(value, Mapping):
            self._report(place, f"a mapping is needed, got {_shown(value)}")
            return None
        known = tuple(known)
        for key in value:
            if key not in known:
                where = f"{place}.{key}" if place else str(key)
                if key in _REMEDIES:
                    self._report(where, _REMEDIES[key])
                else:
                    near = difflib.get_close_matches(str(key), known, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                    self._report(where, f"unknown key; {hint}")
        return {key: value[key] for key in value if key in known}

    def _list(self, value: object, place: str) -> list[Any]:
        if value is None:
            return []
        if not isinstance(value, list):
            self._report(place, f"a list is needed, got {_shown(value)}")
            return []
        return value

    def _slice(self, value: object, place: str, method: Method | None) -> Slice:
        fields = self._mapping(value, place, ("sources", "base_model", "parameters"))
        if fields is None:
            return Slice(())
        if not fields.get("sources"):
            self._report(f"{place}.sources", "is missing or empty")
        base = fields.get("base_model")
        return Slice(
            self._sources(fields.get("sources"), f"{place}.sources", method, with_range=True),
            self._model(base, f"{place}.base_model") if base else None,
            self._parameters(fields.get("parameters"), f"{place}.parameters", method, level="slice"),
        )

    def _sources(self, value: object, place: str, method: Method | None, with_range: bool) -> tuple[Source, ...]:
        sources: list[Source] = []
        for index, item in enumerate(self._list(value, place)):
            where = f"{place}[{index}]"
            keys = ("model", "layer_range", "parameters") if with_range else ("model", "parameters")
            fields = self._mapping(item, where, keys)
            if fields is None:
                continue
            if "model" not in fields:
                self._report(f"{where}.model", "is missing")
                continue
            layers = self._layer_range(fields.get("layer_range"), f"{where}.layer_range") if with_range else None
            model = self._model(fields["model"], f"{where}.model")
            parameters = self._parameters(fields.get("parameters"), f"{where}.parameters", method, level="source")
            if model in [source.model for source in sources]:
                self._report(f"{where}.model", f"{model.id!r} is given twice")
            sources.append(Source(model, layers, parameters))
        return tuple(sources)

    def _layer_range(self, value: object, place: str) -> tuple[int, int] | None:
        numbers = value if isinstance(value, list) else []
        if len(numbers) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
            self._report(place, f"two whole numbers [begin, end) are needed, got {_shown(value)}")
            return None
        if not 0 <= numbers[0] < numbers[1]:
            self._report(place, f"{_shown(value)} is empty; the rule is 0 <= begin < end")
            return None
        return numbers[0], numbers[1]

    def _model(self, value: object, place: str) -> ModelName:
        try:
            if isinstance(value, str):
                return parse_model_name(value, self._directory)
            if isinstance(value, Mapping):
                return self._model_mapping(value, place)
            self._report(place, f"the name of a model is needed, got {_shown(value)}")
        except ValueError as error:
            self._report(place, str(error))
        return ModelName(f"?{place}")  # not equal to any other

    def _model_mapping(self, value: Mapping[Any, Any], place: str) -> ModelName:
        """The long form, `{model: {path, revision}, lora: {path, revision}}`, where text would be ambiguous."""
        fields = self._mapping(value, place, ("model", "lora")) or {}
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
                inner = self._mapping(part, f"{place}.{key}", ("path", "revision")) or {"path": "?"}
                path, revision = inner.get("path"), inner.get("revision")
                if not isinstance(path, str) or not path or not isinstance(revision, str | None):
                    raise ValueError(f"path and revision are texts, got {_shown(part)}")
                names.append((path, revision or None))
        (model, revision), (adapter, adapter_revision) = names
        return ModelName(str(model), revision, adapter, adapter_revision, self._directory)

    def _dtype(self, value: object, place: str) -> str | None:
        if value is None:
            return None
        name = str(value).removeprefix("torch.")
        if name not in DTYPE_NAMES:
            self._report(place, unknown_name("dtype", reprlib.repr(name)[1:-1], DTYPE_NAMES))
            return None
        return name

    def _tokenizer(self, fields: Mapping[str, Any]) -> str | ModelName | None:
        place, value = "tokenizer_source", fields.get("tokenizer_source")
        if fields.get("tokenizer") is not None:
            if value is not None:
                self._report("tokenizer", "give either tokenizer or tokenizer_source")
            inner = fields["tokenizer"]
            if isinstance(inner, Mapping) and set(inner) - {"source"}:
                keys = ", ".join(sorted(str(key) for key in set(inner) - {"source"}))
                self._report("tokenizer", f"only 'source' is supported, got {keys}")
                return None
            # Without a source it is the union there.
            place, value = "tokenizer.source", inner.get("source", "union") if isinstance(inner, Mapping) else inner
        if value is None or value == "base":
            return value
        if value == "union":
            self._report(place, _UNION)
            return None
        return self._model(value, place)

    def _parameters(self, value: object, place: str, method: Method | None, level: str) -> Parameters:
        if value is None:
            return {}
        known = METHODS.values() if method is None else (method,)
        fields = self._mapping(value, place, sorted({n for m in known for n in m.parameters} | {*IGNORED_PARAMETERS}))
        settings: dict[str, Setting] = {}
        for name, setting in (fields or {}).items():
            if name in IGNORED_PARAMETERS or setting is None:
                continue
            where = f"{place}.{name}"
            parameter = method.parameters[name] if method else None
            if parameter and level == "source" and not parameter.per_source:
                self._report(where, "is one value for all models; it stands under the parameters of the slice or file")
                continue
            settings[name] = self._setting(setting, where, parameter.kind if parameter else None)
            if method and parameter and parameter.operator_name:
                self._check_range(method, parameter.operator_name, settings[name], where)
        return settings

    def _check_range(self, method: Method, parameter: str, setting: Setting, place: str) -> None:
        """The ends of a gradient are checked: between them the values lie in the same range."""
        operator = next(name for name, known in METHODS.items() if known is method)
        spec = OPERATOR_SPECS[operator].parameters.get(parameter)
        for rule in setting if spec else ():
            for value in rule.values:
                if spec and (problem := spec.problem(value)):
                    self._report(place, problem)

    def _setting(self, value: object, place: str, kind: Kind | None) -> Setting:
        items = [value] if isinstance(value, Mapping) else value
        if not isinstance(items, list) or not any(isinstance(item, Mapping) for item in items):
            return (Rule(self._values(value, place, kind)),)
        rules = []
        for index, item in enumerate(items):
            where = f"{place}[{index}]" if isinstance(value, list) else place
            fields = self._mapping(item, where, ("filter", "value"))
            if fields is None:
                continue
            if "value" not in fields:
                self._report(where, "'value' is missing")
                continue
            pattern = fields.get("filter")
            if not isinstance(pattern, str | None):
                self._report(f"{where}.filter", f"part of a tensor's name is needed, got {_shown(pattern)}")
                continue
            values = self._values(fields["value"], f"{where}.value", kind)
            rules.append(Rule(values, None if pattern == "*" else pattern))
        return tuple(rules)

    def _values(self, value: object, place: str, kind: Kind | None) -> tuple[Scalar, ...]:
        items = value if isinstance(value, list) else [value]
        scalars = [self._scalar(item, place, kind) for item in items]
        return tuple(scalar for scalar in scalars if scalar is not None)

    def _scalar(self, value: object, place: str, kind: Kind | None) -> Scalar | None:
        """A number, also as text (YAML reads `1e-5` as text), a boolean, also as 0 or 1, or a word."""
        if kind is None:
            return 0.0  # the method is unknown, and reported
        if kind == "choice":
            if isinstance(value, str):
                return value
            self._report(place, f"a word is needed, got {_shown(value)}")
            return None
        if kind == "bool":
            if value in ("true", "false", "True", "False"):
                return str(value).lower() == "true"
            if isinstance(value, bool | int | float) and value in (0, 1):
                return bool(value)
            self._report(place, f"true or false is needed, got {_shown(value)}")
            return None
        number = _number(value)
        if number is None or (kind == "int" and not number.is_integer()):
            self._report(place, f"a {'whole' if kind == 'int' else 'finite'} number is needed, got {_shown(value)}")
            return None
        return int(number) if kind == "int" else number

    def _check_structure(self, document: MergekitDocument, method: Method) -> None:
        pieces = document.slices or (Slice(document.models),)
        if document.tokenizer_source == "base" and document.base_model is None:
            self._report("tokenizer_source", "'base' needs base_model")
        for index, piece in enumerate(pieces):
            place = f"slices[{index}]" if document.slices else "models"
            sources = [source.model for source in piece.sources]
            base = piece.base_model or document.base_model
            if base is None and method.base in ("required", "first"):
                self._report("base_model", f"is missing; {document.method} needs it")
            elif base is not None and base not in sources:
                if document.slices and method.base != "none":
                    self._report(
                        place, f"base_model {base.id!r} must be among the sources of the slice, with its layers"
                    )
                sources += [base] if not document.slices else []
            count = len([source for source in sources if source != base or not method.base_is_apart])
            self._check_count(document, method, place, count)
            for name, parameter in method.parameters.items():
                if parameter.required:
                    self._check_given(document, piece, base, name, place)

    def _check_count(self, document: MergekitDocument, method: Method, place: str, count: int) -> None:
        besides = " besides the base" if method.base_is_apart else ""
        fewest = max(method.min_sources, OPERATOR_SPECS[document.method].min_sources)
        if count < fewest:
            self._report(place, f"{document.method} needs at least {fewest} models{besides}, got {count}")
        elif method.max_sources is not None and count > method.max_sources:
            added = " (a base_model that is not listed is added)" if method.base == "none" and document.models else ""
            self._report(
                place, f"{document.method} takes at most {method.max_sources} models{besides}, got {count}{added}"
            )

    def _check_given(
        self, document: MergekitDocument, piece: Slice, base: ModelName | None, name: str, place: str
    ) -> None:
        """A required parameter that no level gives at all; what filters leave out is seen at the tensors."""
        method = METHODS[document.method]
        if name in document.parameters or name in piece.parameters:
            return
        if not method.parameters[name].per_source:
            self._report(f"parameters.{name}", f"is missing; {document.method} needs it")
            return
        parts = place if document.models else f"{place}.sources"
        for index, source in enumerate(piece.sources):
            if name not in source.parameters and not (method.base_is_apart and source.model == base):
                self._report(f"{parts}[{index}].parameters.{name}", f"is missing; {document.method} needs it")
        if document.models and not method.base_is_apart and base and base not in [s.model for s in piece.sources]:
            self._report(
                f"parameters.{name}",
                f"is missing for {base.id!r}: with {document.method} mergekit adds the base_model to the models; "
                "leave base_model out, or list it with its own value",
            )


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
