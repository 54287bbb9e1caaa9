"""The set of checkpoints that may be merged, in one YAML file:

    base: {id: base, path: base}                                # optional: the common ancestor
    checkpoints:
      - {id: math-strong, path: math-strong, task: math}        # task: what it was fine-tuned for
      - {id: code-strong, path: code-strong, task: code}

Paths are relative to the file. Without a `task` a checkpoint takes part in pairs, but not in `cross-task` ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field

from simmerge_ray.checkpoints import CheckpointRef, check_compatible, checkpoint_digest
from simmerge_ray.config import load_yaml
from simmerge_ray.errors import ConfigError, PlanError, unknown_name
from simmerge_ray.storage import write_once


class _BaseEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str = Field(min_length=1, pattern=r"^[\w.\-]+$")
    path: str = Field(min_length=1)


class _Entry(_BaseEntry):
    task: str | None = None


class _CatalogueFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    base: _BaseEntry | None = None
    checkpoints: tuple[_Entry, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Catalogue:
    """Checkpoints of one architecture, their own tasks by id, and the base they came from (if known)."""

    checkpoints: tuple[CheckpointRef, ...]
    own_task: Mapping[str, str | None]
    base: CheckpointRef | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the checkpoints, in the catalogue's order, the base not included."""
        return tuple(ref.id for ref in self.checkpoints)

    @property
    def all_refs(self) -> tuple[CheckpointRef, ...]:
        """The base, if any, then the checkpoints."""
        return (*((self.base,) if self.base else ()), *self.checkpoints)

    def ref(self, checkpoint_id: str) -> CheckpointRef:
        """The checkpoint of that id.

        Raises:
            PlanError: it is not in the catalogue.
        """
        for ref in self.all_refs:
            if ref.id == checkpoint_id:
                return ref
        raise PlanError(unknown_name("checkpoint", checkpoint_id, (r.id for r in self.all_refs)))

    def pairs(self, which: str = "cross-task") -> list[tuple[str, str]]:
        """Unordered pairs in catalogue order: `all`, or `cross-task`, those whose own tasks differ."""
        pairs = list(combinations(self.ids, 2))
        if which == "all":
            return pairs
        tasks = self.own_task
        return [(a, b) for a, b in pairs if tasks[a] and tasks[b] and tasks[a] != tasks[b]]

    def pair_tasks(self, left: str, right: str) -> tuple[str, ...]:
        """The own tasks of a pair, sorted, without repetition."""
        return tuple(sorted({task for task in (self.own_task[left], self.own_task[right]) if task}))

    def digests(self) -> dict[str, str]:
        """Content digest of every checkpoint by id; reads all their bytes."""
        return {ref.id: checkpoint_digest(ref) for ref in self.all_refs}


def load_catalogue(path: Path) -> Catalogue:
    """Read a catalogue and check from the headers that its checkpoints can be merged with each other.

    Raises:
        ConfigError: the file is missing or malformed, or an id is used twice.
        IncompatibleCheckpointsError: with every problem of every checkpoint.
    """
    file = load_yaml(path, _CatalogueFile)
    base_id = file.base.id if file.base else None
    ids = [entry.id for entry in file.checkpoints] + ([base_id] if base_id else [])
    for checkpoint_id in sorted(set(ids)):
        if ids.count(checkpoint_id) > 1:
            raise ConfigError(f"catalogue {path}: id {checkpoint_id!r} is used {ids.count(checkpoint_id)} times")
    root = path.parent.resolve()
    catalogue = Catalogue(
        checkpoints=tuple(
            CheckpointRef(entry.id, (root / entry.path).resolve(), base_id) for entry in file.checkpoints
        ),
        own_task={entry.id: entry.task for entry in file.checkpoints},
        base=CheckpointRef(file.base.id, (root / file.base.path).resolve()) if file.base else None,
    )
    check_compatible(catalogue.all_refs)
    return catalogue


def write_catalogue(path: Path, catalogue: Catalogue) -> None:
    """Write a catalogue file, paths relative to it where the checkpoints lie below it."""
    root = path.parent.resolve()

    def entry(ref: CheckpointRef) -> dict[str, str]:
        shown = ref.path.relative_to(root) if ref.path.is_relative_to(root) else ref.path
        return {"id": ref.id, "path": str(shown)}

    content: dict[str, object] = {"base": entry(catalogue.base)} if catalogue.base else {}
    content["checkpoints"] = [
        entry(ref) | ({"task": task} if (task := catalogue.own_task[ref.id]) else {}) for ref in catalogue.checkpoints
    ]
    write_once(path, yaml.safe_dump(content, sort_keys=False).encode())
