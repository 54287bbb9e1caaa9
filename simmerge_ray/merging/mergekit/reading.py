"""Text of a mergekit file -> documents. Every problem of the file is reported, in one message."""

from __future__ import annotations

from collections.abc import Sequence

from simmerge_ray.base.errors import PlanError
from simmerge_ray.base.storage import Place
from simmerge_ray.base.yaml_text import YamlError, parse_yaml_documents
from simmerge_ray.merging.mergekit.document_reader import DocumentReader
from simmerge_ray.merging.mergekit.documents import MergekitDocument
from simmerge_ray.merging.mergekit.problems import Problems, raise_problems


def read_mergekit(text: str, directory: Place) -> tuple[MergekitDocument, ...]:
    """Parse one or several documents; relative paths start at `directory`.

    Each stands after those that it names as models; the last is the merge: the one without a name, or that of the file.

    Raises:
        PlanError: with every problem, one a line, each with its place, e.g. `models[1].parameters.weigth`.
    """
    try:
        values = [value for value in parse_yaml_documents(text) if value is not None]
    except YamlError as error:
        raise PlanError(str(error)) from None
    if not values:
        raise PlanError("the file holds no document; it needs merge_method and models or slices")
    problems: list[str] = []
    ignored: list[str] = []
    documents = []
    for index, value in enumerate(values):
        root = f"documents[{index}]" if len(values) > 1 else ""
        documents.append(DocumentReader(directory, Problems(problems, root)).document(value))
        ignored += documents[-1].ignored
    ordered = () if problems else _ordered(documents, problems)
    # An ignored key may be the misspelt one that is missing.
    raise_problems([*problems, *ignored] if problems else (), "this mergekit file cannot be used:")
    return ordered


def _ordered(documents: Sequence[MergekitDocument], problems: list[str]) -> tuple[MergekitDocument, ...]:
    """The documents with those that are named before those that name them, the merge last; a file so ordered stays."""
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
    position = {document.name: place for place, document in enumerate(documents) if document.name is not None}
    is_ordered = documents[-1] is final and all(
        position.get(reference.model, -1) < place
        for place, document in enumerate(documents)
        for reference in document.references()
    )
    return tuple(documents) if is_ordered else tuple(done)  # numbers of steps are part of the seeds of random operators
