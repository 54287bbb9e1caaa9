"""The label store: append-only files under a URI, read as one label per key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from simmerge_ray.base.errors import LabelError, OutputError
from simmerge_ray.base.storage import (
    Place,
    delete_objects,
    digest_bytes,
    digest_json,
    list_leftovers,
    list_objects,
    write_atomically,
)
from simmerge_ray.search.labels.outcomes import Infeasible, LabeledPlan, Measured, Outcome, Stopped, check_comparable
from simmerge_ray.search.labels.rows import check_rows, file_name, parquet_bytes, read_labels, row_digest, to_row

_MAX_LISTINGS = 100

Read = TypeVar("Read")


@dataclass(frozen=True)
class StoreReport:
    """What `LabelStore.check` found: labels are counted once a key, duplicates are the rows beyond that."""

    num_files: int
    num_labels: int
    num_measured: int
    num_stopped: int
    num_infeasible: int
    num_duplicates: int
    problems: tuple[str, ...]


class LabelStore:
    """Labels under a directory URI."""

    def __init__(self, uri: str | Place) -> None:
        self.uri = str(uri).rstrip("/")

    def append(self, labels: Sequence[LabeledPlan]) -> None:
        """Write labels as one file; writing the same labels again replaces that file by an equal one.
        Raises OutputError: it cannot be written."""
        if labels:
            rows = [to_row(label) for label in labels]
            self._write(file_name(rows), rows)

    def read(self) -> list[LabeledPlan]:
        """All labels, one per key, sorted by key.

        Raises:
            LabelError: a file of another schema version, or one that is no label file.
        """
        return _fold(chain.from_iterable(self._each_file(read_labels).values()))

    def digest(self) -> str:
        """Identity of the labels: their keys and utilities."""
        found = []
        for label in self.read():
            outcome = label.outcome
            stopped = [len(outcome.items)] if isinstance(outcome, Stopped) else []
            said = outcome.reason if isinstance(outcome, Infeasible) else outcome.utility
            found.append([label.key, said, *stopped])
        return digest_json(found)

    def compact(self) -> int:
        """Fold all files into one that holds one row per key; the number of files that it replaced.

        Others may append, read and compact meanwhile: only files that were read here are deleted, the new file is
        whole before the first of them goes, and a name stands for the same rows whoever writes it. `check` shows no
        conflicts afterwards, since only one of the rows is kept.

        Raises:
            LabelError: a file cannot be read; nothing is changed.
        """
        files = self._each_file(read_labels)
        rows = [to_row(label) for label in _fold(chain.from_iterable(files.values()))]
        name = file_name(rows)
        folded = [uri for uri in files if uri.rsplit("/", 1)[-1] != name]
        if folded:
            self._write(name, rows)
            delete_objects(folded)
        return len(folded)

    def merge(self, others: Iterable[LabelStore]) -> list[int]:
        """Copy the labels of other stores into this one, a file each; how many were new, by store.

        New is a label that is kept beside, or instead of, those that were here, by the rule of `read`; one that took
        other seconds to the same outcome is not.

        Raises:
            LabelError: labels that must not be mixed (see `check_comparable`), or a file that cannot be read; nothing
                is written.
        """
        known = {label.key: label for label in self.read()}
        copies = []
        for other in others:
            theirs = other.read()
            try:
                check_comparable([*known.values(), *theirs])
            except LabelError as error:
                raise LabelError(f"{other.uri} does not fit {self.uri}: {error}") from None
            new = [
                one for one in theirs if one.key not in known or _order(one.outcome) < _order(known[one.key].outcome)
            ]
            known |= {one.key: one for one in new}
            copies.append(new)
        for new in copies:
            self.append(new)
        return [len(new) for new in copies]

    def check(self) -> StoreReport:
        """Look at every row of every file, and count.

        Problems are files and rows that cannot be read, rows that contradict themselves, keys that were measured with
        different results, and temporary files of writers that were killed.
        """
        files = self._each_file(check_rows)
        found = [label for labels, _ in files.values() for label in labels]
        problems = [problem for _, of_file in files.values() for problem in of_file]
        problems += _conflicts(found)
        problems += [f"{name} is what a killed writer left; delete it" for name in list_leftovers(self.uri)]
        labels = _fold(found)
        kinds = Counter(type(label.outcome) for label in labels)
        return StoreReport(
            num_files=len(files),
            num_labels=len(labels),
            num_measured=kinds[Measured],
            num_stopped=kinds[Stopped],
            num_infeasible=kinds[Infeasible],
            num_duplicates=len(found) - len(labels),
            problems=tuple(problems),
        )

    def _write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        try:
            write_atomically(f"{self.uri}/{name}", parquet_bytes(rows))
        except OSError as error:
            raise OutputError(f"labels cannot be written to {self.uri}: {error.strerror}") from None

    def _each_file(self, read: Callable[[str], Read]) -> dict[str, Read]:
        """What `read` makes of every file, by name; of all labels that were in the store when this began.

        Another process may fold files meanwhile. Then one that was listed is gone, or the listing, which is not atomic,
        holds neither it nor what replaced it. The next listing shows it: it has what replaced it, and lacks files.
        """
        files: dict[str, Read] = {}
        listed: set[str] | None = None
        for _ in range(_MAX_LISTINGS):
            last, listed = listed, set(list_objects(self.uri, ".parquet"))
            unread = sorted(listed - files.keys())
            for name in unread:
                with suppress(FileNotFoundError):
                    files[name] = read(name)
            if last is not None and listed <= files.keys() and (last <= listed or not unread):
                return files
        raise LabelError(f"{self.uri} changes faster than it can be read: {unread[-1]} is listed, but not there")


def _order(outcome: Outcome) -> tuple[int, int, str]:
    """The least is kept: measured, then stopped after most items, then infeasible; ties are ordered by content."""
    if isinstance(outcome, Infeasible):
        return 2, 0, outcome.reason
    return int(isinstance(outcome, Stopped)), -len(outcome.items), digest_bytes(outcome.items.tobytes())


def _fold(labels: Iterable[LabeledPlan]) -> list[LabeledPlan]:
    """One label per key, sorted by key; the order of the labels does not matter."""
    same: dict[str, list[LabeledPlan]] = {}
    for label in labels:
        same.setdefault(label.key, []).append(label)

    def least(equal: list[LabeledPlan]) -> LabeledPlan:
        return min(equal, key=lambda one: (*_order(one.outcome), row_digest(to_row(one)))) if equal[1:] else equal[0]

    return [least(equal) for _, equal in sorted(same.items())]


def _conflicts(labels: Iterable[LabeledPlan]) -> list[str]:
    """Keys that were measured with different results."""
    results: dict[tuple[str, str], set[bytes]] = {}
    for label in labels:
        if isinstance(label.outcome, Measured) and len(label.outcome.items):
            name = f"{label.plan.label} on {label.task}"
            results.setdefault((label.key, name), set()).add(label.outcome.items.tobytes())
    means = {name: sorted(np.frombuffer(items).mean() for items in found) for (_, name), found in results.items()}
    return [
        f"{name} was measured with different results: {', '.join(f'{utility:.6g}' for utility in utilities)}"
        for name, utilities in means.items()
        if len(utilities) > 1
    ]
