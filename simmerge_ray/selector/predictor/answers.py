"""Answers beside the tasks of a search: what `PreparedSearch.answers` takes, and the note that says whose they are.

A label of answers holds one number an answer; whose answers they are, to which task, of which base, and how long each
is stands once in the store, in `_answers/` (readers of Parquet directories skip such names).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from simmerge_ray.base.errors import LabelError
from simmerge_ray.base.storage import Place, as_place, digest_json, list_places, read_json, write_json
from simmerge_ray.search.evaluation.answers import AnswersTask
from simmerge_ray.selector.finding.probed import token_pairs
from simmerge_ray.signals.candidates.answers import Answers
from simmerge_ray.signals.candidates.signatures import Owner

NOTES = "_answers"
_SCHEMA = 1


@dataclass(frozen=True, eq=False)
class AnswersNote:
    """Whose answers a label's task is: name and digest of that task, id of the base, and the answers' tokens (A,)."""

    name: str
    digest: str
    owner: str
    task: str
    base: str
    num_tokens: np.ndarray


def answers_by_owner(answers: Mapping[Owner, Answers], base: str) -> dict[str, list[AnswersTask]]:
    """Of the members; the base's general answers are nobody's task."""
    found: dict[str, list[AnswersTask]] = {}
    for owner, one in answers.items():
        if owner.checkpoint != base:
            found.setdefault(owner.checkpoint, []).append(_task_of(owner, one))
    return found


def note_answers(labels: Place | str, answers: Mapping[Owner, Answers], base: str) -> None:
    """Write the note of some answers into a label store; the same answers make the same file."""
    rows: list[dict[str, Any]] = []
    for owner, written in answers.items():
        if owner.checkpoint != base:
            one = _task_of(owner, written)
            about = {"name": one.name, "digest": one.digest, "owner": owner.checkpoint}
            rows.append(about | {"task": owner.task, "base": base, "num_tokens": one.num_tokens.tolist()})
    write_json(as_place(labels) / NOTES / f"{digest_json(rows)[:16]}.json", {"schema": _SCHEMA, "answers": rows})


def _task_of(owner: Owner, answers: Answers) -> AnswersTask:
    return AnswersTask(f"{owner.checkpoint} to {owner.task}", token_pairs(answers))


def read_notes(labels: Place | str) -> list[AnswersNote]:
    """All notes of a label store. Raises LabelError: one that this version does not read."""
    found: dict[tuple[str, str], AnswersNote] = {}
    for path in list_places(as_place(labels) / NOTES, "*.json"):
        try:
            content = read_json(path)
            if content["schema"] != _SCHEMA:
                raise LabelError(f"{path} has schema {content['schema']}, this version reads {_SCHEMA}")
            for row in content["answers"]:
                note = AnswersNote(**row | {"num_tokens": np.array(row["num_tokens"], dtype=np.int64)})
                found[note.name, note.digest] = note
        except (KeyError, TypeError, ValueError) as error:
            raise LabelError(f"{path} is no note of answers: {error}") from None
    return list(found.values())
