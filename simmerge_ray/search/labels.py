"""Labels: the measured utility of a plan on a task, in append-only Parquet files under a URI.

Every flush is one file, named by the digest of its rows and written once, so several writers never collide, a kill
loses at most the trial in flight, and object stores without rename serve. A key is what the utility depends on: plan,
contents of the checkpoints, task, evaluation settings. `read` keeps one label per key, by an order over what the rows
say: a measured one, then a stopped one of most items, then an infeasible one. Names of files do not count, so readers
find the same labels before, during and after `compact` folds files into one.

A row is one (plan, task). Parents and base are labels of their own (a plan with a `source` and no operators), so that
what a merge gains over them is a join on task. For people with pandas, polars or DuckDB: `operators` and `members` are
the plan in flat columns, all parameters stand in the JSON of `plan`; where `stopped` is true, `utility` is that of a
part of the items and not to be compared. Files of before lack the last columns until they are folded.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simmerge_ray.base.errors import LabelError, StorageError
from simmerge_ray.base.storage import (
    Place,
    delete_objects,
    digest_bytes,
    digest_json,
    list_leftovers,
    list_objects,
    read_bytes,
    write_atomically,
)
from simmerge_ray.plans.plan import MergePlan, plan_from_json
from simmerge_ray.search.headroom import Context

# Schema 2 has stopped trials, which a reader of schema 1 would take for measured ones. Keys stay those of schema 1.
LABEL_SCHEMA = 2
_KNOWN_SCHEMAS = (1, 2)
_KEY_SCHEMA = 1
_ARROW_SCHEMA = pa.schema(
    [
        ("key", pa.string()), ("plan_id", pa.string()), ("plan", pa.string()), ("label", pa.string()),
        ("task", pa.string()), ("task_digest", pa.string()), ("utility", pa.float64()), ("se", pa.float64()),
        ("items", pa.list_(pa.float32())), ("infeasible", pa.string()), ("seconds", pa.float64()),
        ("evaluator", pa.string()), ("settings", pa.string()), ("checkpoints", pa.string()), ("versions", pa.string()),
        ("schema", pa.int64()), ("same_as", pa.string()), ("stopped", pa.bool_()), ("num_items", pa.int64()),
        ("operators", pa.string()), ("members", pa.list_(pa.string())),
    ]
)  # fmt: skip
_MAX_LISTINGS = 100
_ROUNDING = 1e-6  # items are float32; rows of schema 1 have the mean of what they were before

Read = TypeVar("Read")


@dataclass(frozen=True)
class _Evaluated:
    items: np.ndarray

    @property
    def utility(self) -> float:
        return float(self.items.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, from the items' variance."""
        return float(self.items.std(ddof=1) / np.sqrt(len(self.items))) if len(self.items) > 1 else 0.0


@dataclass(frozen=True)
class Measured(_Evaluated):
    """Per-item utilities of an evaluated merge, (num_items,) in [0, 1]."""


@dataclass(frozen=True)
class Stopped(_Evaluated):
    """Per-item utilities, (num_evaluated,), of a merge that a search gave up after a part of the items.

    Not a `Measured`: nothing learns from it, and its utility is not compared with that of all items.
    """


@dataclass(frozen=True)
class Infeasible:
    """Why a merge has no utility."""

    reason: str


Outcome = Measured | Stopped | Infeasible


@dataclass(frozen=True)
class EvaluationSettings:
    """What a utility depends on besides weights and items."""

    evaluator: str
    dtype: str
    max_model_len: int


@dataclass(frozen=True)
class LabeledPlan:
    """One (plan, task) with its outcome and all it was made from.

    checkpoints: content digest of every checkpoint that was read, by id. seconds: merge and evaluation. same_as: label
    of the plan that was evaluated in its place, because both are one merge.
    """

    plan: MergePlan
    task: str
    task_digest: str
    outcome: Outcome
    settings: EvaluationSettings
    checkpoints: Mapping[str, str]
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    same_as: str | None = None

    @property
    def key(self) -> str:
        return label_key(self.plan, self.task_digest, self.settings, self.checkpoints)


def label_key(plan: MergePlan, task_digest: str, settings: EvaluationSettings, checkpoints: Mapping[str, str]) -> str:
    """Digest of all that a utility depends on."""
    return digest_json([_KEY_SCHEMA, plan.id, task_digest, vars(settings), dict(checkpoints)])


def used_digests(plan: MergePlan, digests: Mapping[str, str], base_id: str | None) -> dict[str, str]:
    """Content digests of the checkpoints that a plan reads, the base only where an operator takes it."""
    used = [*plan.members, *([base_id] if base_id and plan.uses_base else [])]
    return {checkpoint_id: digests[checkpoint_id] for checkpoint_id in sorted(set(used))}


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
        """Write labels as one file; writing the same labels again replaces that file by an equal one."""
        if not labels:
            return
        rows = [_to_row(label) for label in labels]
        self._write(_file_name(rows), rows)

    def read(self) -> list[LabeledPlan]:
        """All labels, one per key, sorted by key.

        Raises:
            LabelError: a file of another schema version, or one that is no label file.
        """
        return _fold(chain.from_iterable(self._each_file(_read_labels).values()))

    def digest(self) -> str:
        """Identity of the labels: their keys and utilities."""
        return digest_json([[label.key, *_result(label.outcome)] for label in self.read()])

    def keys(self, include_stopped: bool = False) -> set[str]:
        """Keys of the labels that need no further work for a grid: measured and infeasible ones.

        Args:
            include_stopped: also those that a search gave up, for a search that will not try them again.
        """
        return {label.key for label in self.read() if include_stopped or not isinstance(label.outcome, Stopped)}

    def compact(self) -> int:
        """Fold all files into one that holds one row per key; the number of files that it replaced.

        Others may append, read and compact meanwhile: only files that were read here are deleted, the new file is
        whole before the first of them goes, and a name stands for the same rows whoever writes it. `check` shows no
        conflicts afterwards, since only one of the rows is kept.

        Raises:
            LabelError: a file cannot be read; nothing is changed.
        """
        files = self._each_file(_read_labels)
        rows = [_to_row(label) for label in _fold(chain.from_iterable(files.values()))]
        name = _file_name(rows)
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
        files = self._each_file(_check_file)
        found = [label for labels, _ in files.values() for label in labels]
        problems = [problem for _, of_file in files.values() for problem in of_file]
        problems += _conflicts(found)
        problems += [f"{name} is what a killed writer left; delete it" for name in list_leftovers(self.uri)]
        labels = _fold(found)
        kinds = Counter(type(label.outcome) for label in labels)
        num_duplicates = len(found) - len(labels)
        counts = (len(files), len(labels), kinds[Measured], kinds[Stopped], kinds[Infeasible], num_duplicates)
        return StoreReport(*counts, tuple(problems))

    def _write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_ARROW_SCHEMA), buffer)
        write_atomically(f"{self.uri}/{name}", buffer.getvalue())

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


def _result(outcome: Outcome) -> tuple[Any, ...]:
    if isinstance(outcome, Infeasible):
        return (outcome.reason,)
    return (outcome.utility, *([len(outcome.items)] if isinstance(outcome, Stopped) else []))


def _order(outcome: Outcome) -> tuple[int, int, str]:
    """Less is said first: measured, then most items; results that differ have one order, too, whoever compares."""
    if isinstance(outcome, Infeasible):
        return 2, 0, outcome.reason
    return int(isinstance(outcome, Stopped)), -len(outcome.items), digest_bytes(outcome.items.tobytes())


def _preference(label: LabeledPlan) -> tuple[int, int, str, str]:
    """The label of a key that is least in this is kept."""
    return (*_order(label.outcome), _row_digest(_to_row(label)))


def _fold(labels: Iterable[LabeledPlan]) -> list[LabeledPlan]:
    """One label per key, sorted by key; the order of the labels does not matter."""
    kept: dict[str, LabeledPlan] = {}
    for label in labels:
        key = label.key
        known = kept.get(key)
        kept[key] = label if known is None else min(known, label, key=_preference)
    return [kept[key] for key in sorted(kept)]


def _conflicts(labels: Iterable[LabeledPlan]) -> list[str]:
    """Keys that were measured with different results."""
    results: dict[tuple[str, str], set[bytes]] = {}
    for label in labels:
        if isinstance(label.outcome, Measured) and len(label.outcome.items):
            name = f"{label.plan.label} on {label.task}"
            results.setdefault((label.key, name), set()).add(label.outcome.items.tobytes())
    problems = []
    for (_, name), different in results.items():
        if len(different) > 1:
            utilities = sorted(np.frombuffer(items).mean() for items in different)
            shown = ", ".join(f"{utility:.6g}" for utility in utilities)
            problems.append(f"{name} was measured with different results: {shown}")
    return problems


def _row_digest(row: Mapping[str, Any]) -> str:
    return digest_bytes(json.dumps(row, sort_keys=True).encode())


def _file_name(rows: Sequence[Mapping[str, Any]]) -> str:
    """By all that the rows say: were it their keys alone, a later outcome would overwrite an earlier one."""
    return f"{digest_bytes(*(_row_digest(row).encode() for row in rows))}.parquet"


def _to_row(label: LabeledPlan) -> dict[str, Any]:
    outcome = label.outcome
    evaluated = None
    if not isinstance(outcome, Infeasible):
        # As stored, so that `utility` is the mean of `items`, and a label that is read makes the same row again.
        evaluated = _Evaluated(outcome.items.astype(np.float32).astype(np.float64))
    return {
        "key": label.key,
        "plan_id": label.plan.id,
        "plan": json.dumps(label.plan.to_json()),
        "label": label.plan.label,
        "task": label.task,
        "task_digest": label.task_digest,
        "utility": evaluated.utility if evaluated else None,
        "se": evaluated.standard_error if evaluated else None,
        "items": evaluated.items.tolist() if evaluated else None,
        "infeasible": outcome.reason if isinstance(outcome, Infeasible) else None,
        "seconds": label.seconds,
        "evaluator": label.settings.evaluator,
        "settings": json.dumps(vars(label.settings), sort_keys=True),
        "checkpoints": json.dumps(dict(label.checkpoints), sort_keys=True),
        "versions": json.dumps(dict(label.versions), sort_keys=True),
        "schema": LABEL_SCHEMA,
        "same_as": label.same_as,
        "stopped": isinstance(outcome, Stopped),
        "num_items": len(evaluated.items) if evaluated else 0,
        "operators": " ; ".join(step.arm.label for step in label.plan.steps),
        "members": list(label.plan.members),
    }


def _read_rows(name: str) -> list[dict[str, Any]]:
    """Rows of a file. Raises LabelError for what is no label file, FileNotFoundError for what is not there any more."""
    try:
        file = pq.ParquetFile(pa.BufferReader(read_bytes(name)), pre_buffer=False)
        rows: list[dict[str, Any]] = file.read(use_threads=False).to_pylist()  # a store has thousands of small files
    except (FileNotFoundError, StorageError):
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise LabelError(f"{name} is not a label file: {error}") from None
    for row in rows:
        if row.get("schema") not in _KNOWN_SCHEMAS:
            known = " and ".join(map(str, _KNOWN_SCHEMAS))
            raise LabelError(f"{name} has label schema {row.get('schema')}, this version reads {known}")
    return rows


def _from_row(name: str, number: int, row: Mapping[str, Any]) -> LabeledPlan:
    try:
        outcome: Outcome
        if row["infeasible"] is not None:
            outcome = Infeasible(row["infeasible"])
        elif row["items"] is None:
            raise ValueError("neither items nor a reason why there are none")
        else:
            kind = Stopped if row.get("stopped") else Measured
            outcome = kind(np.array(row["items"], dtype=np.float64))
        return LabeledPlan(
            plan=plan_from_json(json.loads(row["plan"])),
            task=row["task"],
            task_digest=row["task_digest"],
            outcome=outcome,
            settings=EvaluationSettings(**json.loads(row["settings"])),
            checkpoints=json.loads(row["checkpoints"]),
            seconds=row["seconds"],
            versions=json.loads(row["versions"]),
            same_as=row.get("same_as"),  # files of before do not have it
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LabelError(f"{name}, row {number}: {error}") from None


def _read_labels(name: str) -> list[LabeledPlan]:
    return [_from_row(name, number, row) for number, row in enumerate(_read_rows(name), 1)]


def _check_file(name: str) -> tuple[list[LabeledPlan], list[str]]:
    """Labels of a file up to the first that cannot be read, and its problems."""
    labels: list[LabeledPlan] = []
    problems: list[str] = []
    try:
        for number, row in enumerate(_read_rows(name), 1):
            labels.append(_from_row(name, number, row))
            problems += [f"{name}, row {number}: {problem}" for problem in _row_problems(row, labels[-1])]
    except LabelError as error:
        problems.append(str(error))
    return labels, problems


def _row_problems(row: Mapping[str, Any], label: LabeledPlan) -> list[str]:
    """Where a row contradicts itself."""
    problems = []
    if row["key"] != label.key:
        problems.append(f"key {row['key']} does not belong to {label.plan.label} on {label.task}")
    if isinstance(label.outcome, Infeasible):
        return problems
    items = label.outcome.items
    if not len(items):
        return [*problems, "has no items"]
    if row.get("num_items") not in (None, len(items)):
        problems.append(f"num_items is {row['num_items']}, it has {len(items)}")
    outside = items[~((items >= 0) & (items <= 1))]
    if len(outside):
        problems.append(f"items outside [0, 1]: {', '.join(f'{item:.6g}' for item in outside[:3])}")
    elif row["utility"] is None or abs(row["utility"] - label.outcome.utility) > _ROUNDING:
        problems.append(f"utility is {row['utility']}, the mean of its items is {label.outcome.utility:.6g}")
    return problems


def single_items(labels: Iterable[LabeledPlan]) -> dict[tuple[str, str], np.ndarray]:
    """Per-item utilities of unmerged checkpoints by (checkpoint id, task)."""
    return {
        (label.plan.source, label.task): label.outcome.items
        for label in labels
        if label.plan.source is not None and isinstance(label.outcome, Measured)
    }


def measures_arm(label: LabeledPlan) -> bool:
    """Whether it measures an arm on a pair: one step with equal weights, as arms are defined."""
    plan = label.plan
    return (
        len(plan.steps) == 1 and plan.steps[0].weight == 0.5 and not plan.seed and isinstance(label.outcome, Measured)
    )


def pair_contexts(labels: Sequence[LabeledPlan], arms: Sequence[str]) -> list[Context]:
    """Contexts (pair, task) in which every one of `arms` and both parents were measured, sorted.

    An arm is measured by its plan with equal weights; what a search tries beside that does not stand for it.

    Raises:
        LabelError: two labels disagree on the items, evaluator or settings, so they must not be compared.
    """
    check_comparable(labels)
    singles = single_items(labels)
    found: dict[tuple[str, str, str], dict[str, np.ndarray]] = {}
    for label in labels:
        if measures_arm(label) and isinstance(label.outcome, Measured):
            step = label.plan.steps[0]
            left, right = sorted((step.left, step.right))
            found.setdefault((left, right, label.task), {})[step.arm.label] = label.outcome.items
    contexts = []
    for (left, right, task), utilities in sorted(found.items()):
        parents = [singles.get((parent, task)) for parent in (left, right)]
        if all(arm in utilities for arm in arms) and parents[0] is not None and parents[1] is not None:
            contexts.append(Context(left, right, task, {arm: utilities[arm] for arm in arms}, parents[0], parents[1]))
    return contexts


def check_comparable(labels: Sequence[LabeledPlan]) -> None:
    """Refuse to mix labels of different items, evaluators or checkpoint contents under one name.

    Raises:
        LabelError: naming what differs.
    """
    items: dict[str, str] = {}
    contents: dict[str, str] = {}
    settings: EvaluationSettings | None = None
    for label in labels:
        if items.setdefault(label.task, label.task_digest) != label.task_digest:
            raise LabelError(
                f"labels of task {label.task!r} were made with different items; keep them in separate stores"
            )
        if settings is not None and settings != label.settings:
            raise LabelError(f"labels were made with different settings: {settings} and {label.settings}")
        settings = label.settings
        for checkpoint_id, digest in label.checkpoints.items():
            if contents.setdefault(checkpoint_id, digest) != digest:
                raise LabelError(f"labels were made with different contents of checkpoint {checkpoint_id!r}")
