"""Whether the parts of a mergekit document fit its method: the base, the number of models, required parameters."""

from __future__ import annotations

from collections.abc import Callable

from simmerge_ray.merging.mergekit.documents import MergekitDocument, ModelName, Slice
from simmerge_ray.merging.mergekit.methods import METHODS, Method
from simmerge_ray.plans.operators.specs import OPERATOR_SPECS

Report = Callable[[str, str], None]


def check_structure(document: MergekitDocument, method: Method, report: Report) -> None:
    """Report what does not fit."""
    pieces = document.slices or (Slice(document.models),)
    if document.tokenizer_source == "base" and document.base_model is None:
        report("tokenizer_source", "'base' needs base_model")
    for index, piece in enumerate(pieces):
        place = f"slices[{index}]" if document.slices else "models"
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


def _check_count(document: MergekitDocument, method: Method, place: str, count: int, report: Report) -> None:
    besides = " besides the base" if method.base_is_apart else ""
    fewest = max(method.min_sources, OPERATOR_SPECS[document.method].min_sources)
    if count < fewest:
        report(place, f"{document.method} needs at least {fewest} models{besides}, got {count}")
    elif method.max_sources is not None and count > method.max_sources:
        added = " (a base_model that is not listed is added)" if method.base == "none" and document.models else ""
        report(place, f"{document.method} takes at most {method.max_sources} models{besides}, got {count}{added}")


def _check_given(
    document: MergekitDocument, piece: Slice, base: ModelName | None, name: str, place: str, report: Report
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
