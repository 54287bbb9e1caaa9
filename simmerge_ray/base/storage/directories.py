"""Directories that are either whole or absent, on a disk and in a store, which knows no rename of a directory.

On a disk a directory is filled under another name and renamed. In a store its objects are written one by one, and last
`simmerge_contents.json`, which lists them with sizes and digests: a directory whose list is absent is not there yet,
and a reader takes nothing that does not agree with it. Writers that replace one directory at the same moment end with
one whole directory, that of the last.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from simmerge_ray.base.errors import StorageError
from simmerge_ray.base.storage.node_cache import node_cache
from simmerge_ray.base.storage.objects import digest_bytes, digest_file, read_json
from simmerge_ray.base.storage.places import Entry, Place, RemotePath

CONTENTS = "simmerge_contents.json"
_MAX_DIGESTED_BYTES = 1 << 26  # larger files are weights, whose size and header are checked by every reader
_TRIES, _PAUSE_S = 6, 0.5

_log = logging.getLogger(__name__)


@contextmanager
def new_directory(target: Place) -> Iterator[Path]:
    """A temporary directory to fill; it takes the name `target` only when the block ends without an error.

    An older directory of that name is replaced at that moment; after a kill only a hidden `.partial` sibling is left,
    which the next call for the same target removes. What another process is filling for it at this moment stays. In a
    store, see the module.
    """
    if isinstance(target, RemotePath):
        with scratch_directory() as partial:
            yield partial
            upload_directory(partial, target)
        return
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}.*.partial"):
        if not _is_of_running_process(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        publish_directory(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_of_running_process(partial: Path) -> bool:
    """Whether another process of this machine is filling it."""
    owner = partial.name.split(".")[-2]
    if not owner.isdigit() or int(owner) == os.getpid():
        return False
    try:
        os.kill(int(owner), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def publish_directory(partial: Path, target: Path) -> None:
    """Give a finished sibling directory the name `target`; an older directory of that name is replaced."""
    target = target.absolute()
    old = target.with_name(f".{target.name}.old.partial")
    shutil.rmtree(old, ignore_errors=True)  # left by a kill between the two renames
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)


def filled_in_place(target: Place) -> AbstractContextManager[Path]:
    """A local directory for a stage that writes several artifacts into `target`, each whole by itself: `target` itself,
    or for a store one whose files appear there together when the block ends without an error.
    """
    return new_directory(target) if isinstance(target, RemotePath) else nullcontext(target)


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A new directory on a disk of this node, removed at the end (`TMPDIR` says where)."""
    with tempfile.TemporaryDirectory(prefix="simmerge-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def upload_directory(
    source: Path, target: RemotePath, last: str | None = None, there: Mapping[str, int] | None = None
) -> None:
    """Write the files of a local directory into a store; see the module. Objects of the old list that are not in the
    new one are deleted, others below the same name are left alone.

    last: a file without which other programs do not take the directory for what it is (`config.json` of a checkpoint);
    it is absent until all others are there. there: objects that have been written already, with their sizes.

    Raises StorageError: the store does not take it, in all tries; the directory has no list then.
    """
    files = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    ordered = [name for name in files if name != last] + [name for name in files if name == last]
    sizes = {name: {"size": size} for name, size in (there or {}).items()}
    contents = {"files": {name: _described(source / name) for name in files} | sizes}
    before = _read_contents(target) or {}
    for attempt in range(_TRIES):
        _withdraw(target, last)
        written = {name: (target / name).upload(source / name).version for name in ordered}
        for name in sorted(before.keys() - contents["files"].keys()):
            (target / name).unlink()
        (target / CONTENTS).write_bytes(json.dumps(contents, indent=2).encode())
        now = {str(entry.path.relative_to(target)): entry.version for entry in target.list_below()}
        if all(now.get(name) == version for name, version in written.items()):
            return
        _log.warning("%s was written by another process at the same time; writing it again", target)
        time.sleep(_PAUSE_S * attempt)
    raise StorageError(f"{target} is written by another process again and again; give every one its own directory")


def remove_directory(target: RemotePath, last: str | None = None) -> None:
    """Delete a directory in a store: its list first (and `last`), then the objects in the list, and no others."""
    before = _read_contents(target) or {}
    _withdraw(target, last)
    for name in sorted(before):
        (target / name).unlink()


def _withdraw(target: RemotePath, last: str | None) -> None:
    (target / CONTENTS).unlink()
    if last is not None:
        (target / last).unlink()


def _described(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    return {"size": size} | ({"digest": digest_file(file)} if size <= _MAX_DIGESTED_BYTES else {})


def _read_contents(place: RemotePath) -> dict[str, dict[str, Any]] | None:
    """The list of a directory, file by file; None where there is none."""
    try:
        found = read_json(place / CONTENTS)["files"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{place / CONTENTS} is damaged; delete it and make the directory again") from None
    return dict(found)


def is_complete(place: Place) -> bool:
    """Whether a directory is there: on a disk by its name, in a store by its list."""
    return (place / CONTENTS).exists() if isinstance(place, RemotePath) else place.is_dir()


@contextmanager
def local_directory(place: Place, wanted: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """A directory as a local one while the block runs: itself, or a copy in the node's cache.

    wanted: which names a copy has, of the files in the directory itself; None takes all, also those below, and
    compares them with their list.

    Raises FileNotFoundError: a store has nothing there. StorageError: it cannot be had whole, or the cache is full.
    """
    if not isinstance(place, RemotePath):
        yield place
        return
    entries = _wanted_entries(place, wanted)
    if not entries:
        raise FileNotFoundError(2, "no such directory", str(place))
    versions = [f"{name}\0{entry.version}".encode() for name, entry in entries.items()]
    key = digest_bytes(b"directory", str(place).encode(), *versions)

    def fill(target: Path) -> None:
        for attempt in range(_TRIES):
            listed = _read_contents(place) if wanted is None else None
            problem = _fill_once(_wanted_entries(place, wanted), target, listed)
            if problem is None:
                return
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(exist_ok=True)
            time.sleep(_PAUSE_S * (attempt + 1))  # somebody replaces it now
        raise StorageError(f"{place} does not agree with its {CONTENTS}: {problem}; make it again")

    with node_cache().directory(key, sum(entry.size for entry in entries.values()), fill) as directory:
        yield directory


def _wanted_entries(place: RemotePath, wanted: Callable[[str], bool] | None) -> dict[str, Entry]:
    if wanted is None:
        return {str(entry.path.relative_to(place)): entry for entry in place.list_below()}
    files = (entry for entry in place.list_children() if not entry.is_directory and entry.path != place)
    return {entry.path.name: entry for entry in files if wanted(entry.path.name)}


def _fill_once(
    entries: Mapping[str, Entry], target: Path, listed: Mapping[str, Mapping[str, Any]] | None
) -> str | None:
    """Copy a directory; what is wrong with the copy, if something is."""
    for name in sorted(entries if listed is None else listed):
        if name not in entries:
            return f"{name} is absent"
        try:
            entries[name].download(target / name)
        except (FileNotFoundError, StorageError) as error:
            return str(error)
        if listed is not None and _described(target / name) != dict(listed[name]):
            return f"{name} is another file"
    return None
