"""The set of checkpoints that may be merged, in one YAML file:

    base: {id: base, path: base}                                # optional: the common ancestor
    checkpoints:
      - {id: math-strong, path: math-strong, task: math}        # task: what it was fine-tuned for
      - {id: code-lora, path: base, adapter: code-lora, task: code}   # a PEFT LoRA adapter and the model it changes

An entry may have `grams: DIRECTORY`, which `simmerge tune --method regmean` writes.
Paths are relative to the file; it, and every path in it, may be a URI.
Without a `task` a checkpoint takes part in pairs, but not in `cross-task` ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import Field

from simmerge_ray.base.config import FrozenConfig, check_config, load_yaml
from simmerge_ray.base.errors import CheckpointError, ConfigError, OutputError, PlanError, unknown_name
from simmerge_ray.base.storage import (
    Output,
    Place,
    as_place,
    check_outputs,
    name_below,
    place_in,
    read_text,
    write_atomically,
)
from simmerge_ray.base.yaml_text import YamlError, parse_yaml
from simmerge_ray.checkpoints.adapters import LoraAdapter
from simmerge_ray.checkpoints.compatibility import compatibility_problems, refuse_problems
from simmerge_ray.checkpoints.digests import DEFAULT_CACHE, cached_digest
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef

if TYPE_CHECKING:
    from ruamel.yaml.comments import CommentedMap


_MAX_NAME = 200  # characters: it stands in tables, plans and names of files


class _BaseEntry(FrozenConfig):
    id: str = Field(min_length=1, max_length=_MAX_NAME, pattern=r"^[\w.\-]+$")
    path: str = Field(min_length=1)


class _Entry(_BaseEntry):
    adapter: str | None = Field(None, min_length=1)
    task: str | None = Field(None, max_length=_MAX_NAME)
    grams: str | None = Field(None, min_length=1)


class _Draft(FrozenConfig):
    """A catalogue that may still be without checkpoints."""

    base: _BaseEntry | None = None
    checkpoints: tuple[_Entry, ...] = ()


class _CatalogueFile(_Draft):
    checkpoints: tuple[_Entry, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Catalogue:
    """Checkpoints of one architecture, their own tasks by id, and the base they came from (if known)."""

    checkpoints: tuple[CheckpointRef, ...]
    own_task: Mapping[str, str | None]
    base: CheckpointRef | None = None

    @staticmethod
    def load(path: str | Place) -> Catalogue:
        """`load_catalogue`: read the YAML file, and check from headers that its checkpoints can be merged."""
        return load_catalogue(as_place(path))

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the checkpoints, in the catalogue's order, the base not included."""
        return tuple(ref.id for ref in self.checkpoints)

    @property
    def all_refs(self) -> tuple[CheckpointRef, ...]:
        """The base, if any, then the checkpoints."""
        return (*((self.base,) if self.base else ()), *self.checkpoints)

    def ref(self, checkpoint_id: str) -> CheckpointRef:
        """The checkpoint of that id. Raises PlanError: it is not in the catalogue."""
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

    def tasks_of(self, members: Sequence[str]) -> tuple[str, ...]:
        """The members' own tasks, sorted, without repetition."""
        return tuple(sorted({task for name in members if (task := self.own_task[name])}))

    def digests(self, cache: Path = DEFAULT_CACHE) -> dict[str, str]:
        """Content digest of every checkpoint by id; reads all bytes of those whose files have changed since."""
        return {ref.id: cached_digest(ref, cache) for ref in self.all_refs}


def twins(catalogue: Catalogue) -> list[str]:
    """For a person: checkpoints that hold the same weights as one before them, as copies do. Reads as `digests`."""
    first: dict[str, str] = {}
    told = []
    for name, digest in catalogue.digests().items():
        if (other := first.setdefault(digest, name)) != name:
            what = "the base" if catalogue.base is not None and other == catalogue.base.id else repr(other)
            told.append(f"{name!r} holds the same weights as {what}, so a merge gains nothing from it: leave it out")
    return told


def load_catalogue(path: Place, draft: bool = False) -> Catalogue:
    """Read a catalogue and check from the headers that its checkpoints can be merged with each other.

    A `draft` may have a base and no checkpoints yet.

    Raises:
        ConfigError: the file is missing or malformed, or an id is used twice.
        IncompatibleCheckpointsError: with every problem of every checkpoint.
    """
    catalogue = _resolved(path, load_yaml(path, _Draft if draft else _CatalogueFile))
    refuse_problems(_problems(catalogue.all_refs))
    return catalogue


def _resolved(path: Place, file: _Draft) -> Catalogue:
    base_id = file.base.id if file.base else None
    ids = [entry.id for entry in file.checkpoints] + ([base_id] if base_id else [])
    for checkpoint_id in sorted(set(ids)):
        if ids.count(checkpoint_id) > 1:
            raise ConfigError(f"catalogue {path}: id {checkpoint_id!r} is used {ids.count(checkpoint_id)} times")
    root = path.parent.resolve()
    base = CheckpointRef(file.base.id, place_in(root, file.base.path)) if file.base else None
    checkpoints = tuple(
        CheckpointRef(
            e.id,
            place_in(root, e.path),
            base_id,
            place_in(root, e.adapter) if e.adapter else None,
            place_in(root, e.grams) if e.grams else None,
        )
        for e in file.checkpoints
    )
    for ref in checkpoints:
        if base is not None and ref.adapter is None and ref.path == base.path:
            raise ConfigError(f"catalogue {path}: {ref.id!r} is the base itself ({base.path}); leave it out")
    return Catalogue(checkpoints, {entry.id: entry.task for entry in file.checkpoints}, base)


def _problems(refs: Sequence[CheckpointRef]) -> list[str]:
    """What keeps the checkpoints from being merged, and adapters that do not fit their model."""
    problems = compatibility_problems(refs)
    for ref in refs:
        if ref.adapter is not None:
            try:
                LoraAdapter(ref, read_headers(ref))
            except CheckpointError as error:
                problems.append(str(error))
    return list(dict.fromkeys(problems))  # an unreadable model is a problem of both checks


def write_catalogue(path: Place, catalogue: Catalogue) -> None:
    """Write a catalogue file, paths relative to it for checkpoints below it."""
    content: dict[str, object] = {"base": _entry(path, catalogue.base)} if catalogue.base else {}
    content["checkpoints"] = [_entry(path, ref, catalogue.own_task[ref.id]) for ref in catalogue.checkpoints]
    write_atomically(path, yaml.safe_dump(content, sort_keys=False).encode())


def new_catalogue_text(path: Place, catalogue: Catalogue, head: str) -> str:
    """A catalogue file for `path` with a comment at its head, a checkpoint a line. Raises IncompatibleCheckpointsError:
    they cannot be merged with each other."""
    refuse_problems(_problems(catalogue.all_refs))
    text = ""
    if catalogue.base is not None:
        text = _edited_text(path, text, partial(_put_in, entry=_entry(path, catalogue.base), as_base=True))
    for ref in catalogue.checkpoints:
        entry = _entry(path, ref, catalogue.own_task[ref.id])
        text = _edited_text(path, text, partial(_put_in, entry=entry, as_base=False))
    return head + text


def check_addition(path: Place, checkpoint_id: str, as_base: bool = False) -> None:
    """Refuse what no checkpoint could be added as; reads the catalogue file alone, if it exists.

    Raises:
        ConfigError: the file or the id is malformed, the id is used already, or there is a base already.
        OutputError: the file cannot be written.
    """
    check_config(_BaseEntry, {"id": checkpoint_id, "path": "."}, f"checkpoint {checkpoint_id!r}")
    if isinstance(path, Path) and not path.parent.exists():
        raise ConfigError(f"catalogue {path}: there is no directory {path.parent}; make it first")
    check_outputs([Output(path, "CATALOGUE", is_file=True)])  # before anything is fetched
    if not path.exists():
        return
    file = load_yaml(path, _Draft)
    if checkpoint_id in {entry.id for entry in (*file.checkpoints, *((file.base,) if file.base else ()))}:
        raise ConfigError(f"catalogue {path}: id {checkpoint_id!r} is used already; choose another one")
    if as_base and file.base is not None:
        raise ConfigError(f"catalogue {path}: {file.base.id!r} is its base already; a catalogue has one base")


def add_checkpoint(path: Place, ref: CheckpointRef, task: str | None = None, as_base: bool = False) -> Catalogue:
    """Append a checkpoint to a catalogue file, or make it the base; a file that does not exist is begun.

    The other entries and the comments stay as they are. Nothing is written before all checkpoints, the new one too, are
    found compatible from their headers.

    Raises as `check_addition` and `load_catalogue`; OutputError: the file cannot be written.
    """
    check_addition(path, ref.id, as_base)
    text = read_text(path) if path.exists() else ""
    entry = _entry(path, ref, task)
    if as_base and ("adapter" in entry or "task" in entry):
        raise ConfigError(
            f"base {ref.id!r}: a base takes no adapter (merge it into its model first) and no task; leave them out"
        )
    edited = _edited_text(path, text, partial(_put_in, entry=entry, as_base=as_base))
    refuse_problems(_problems(_parsed(path, edited).all_refs))
    return _write_edited(path, edited)


def _parsed(path: Place, text: str) -> Catalogue:
    return _resolved(path, check_config(_Draft, parse_yaml(text) or {}, f"catalogue {path}"))


def _write_edited(path: Place, text: str) -> Catalogue:
    catalogue = _parsed(path, text)
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise OutputError(f"catalogue {path} cannot be written: {error.strerror}") from None
    return catalogue


def remove_checkpoint(path: Place, checkpoint_id: str) -> Catalogue:
    """Take an entry, or the base, out of a catalogue file; the files of the checkpoint stay. Other entries and comments
    stay as they are, and nothing is read but the file, so that an entry whose files are gone can be taken out, too.

    Raises:
        ConfigError: the file is malformed. PlanError: no such id. OutputError: the file cannot be written.
    """
    file = load_yaml(path, _Draft)
    is_base = file.base is not None and file.base.id == checkpoint_id
    ids = [entry.id for entry in file.checkpoints]
    if not is_base and checkpoint_id not in ids:
        raise PlanError(f"catalogue {path}: {unknown_name('checkpoint', checkpoint_id, ids)}")

    def take_out(content: CommentedMap) -> None:
        if is_base:
            del content["base"]
        else:
            del content["checkpoints"][ids.index(checkpoint_id)]

    return _write_edited(path, _edited_text(path, read_text(path), take_out))


def shown_path(path: Place, directory: Place) -> str:
    """How a catalogue names `path`: relative to the catalogue's directory if it is below it."""
    root, path = directory.resolve(), path.resolve()
    try:
        return name_below(path, root)
    except ValueError:
        return str(path)


def _entry(path: Place, ref: CheckpointRef, task: str | None = None) -> dict[str, str]:
    entry = {"id": ref.id, "path": shown_path(ref.path, path.parent)}
    if ref.adapter is not None:
        entry["adapter"] = shown_path(ref.adapter, path.parent)
    if ref.grams is not None:
        entry["grams"] = shown_path(ref.grams, path.parent)
    return entry | ({"task": task} if task else {})


def _edited_text(path: Place, text: str, edit: Callable[[CommentedMap], None]) -> str:
    """`text` after an edit of its content; comments, quotes and indentation stay."""
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.util import load_yaml_guess_indent

    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 10_000
    try:
        content, sequence, dash = load_yaml_guess_indent(text, yaml=editor)
    except DuplicateKeyError as error:
        raise ConfigError(f"catalogue {path} cannot be edited: {' '.join(str(error).split())}") from None
    editor.indent(sequence=sequence if dash is not None else 4, offset=2 if dash is None else dash)
    content = CommentedMap() if content is None else content
    edit(content)
    out = StringIO()
    editor.dump(content, out)
    return out.getvalue()


def _put_in(content: CommentedMap, entry: Mapping[str, str], as_base: bool) -> None:
    """An entry as the base or as the last checkpoint."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq
    from ruamel.yaml.scalarstring import SingleQuotedScalarString

    line = CommentedMap({k: v if _is_plain(v) else SingleQuotedScalarString(v) for k, v in entry.items()})
    line.fa.set_flow_style()
    if as_base:
        content.pop("base", None)  # an empty one
        content.insert(0, "base", line)
    elif content.get("checkpoints"):
        content["checkpoints"].append(line)
    else:
        content["checkpoints"] = CommentedSeq([line])


def _is_plain(value: str) -> bool:
    """Whether YAML 1.1 reads the bare word in a flow mapping as that text (not so `no`, `007`, `1e3`, `:0`)."""
    try:
        return bool(parse_yaml(f"{{key: {value}}}") == {"key": value})
    except YamlError:
        return False
