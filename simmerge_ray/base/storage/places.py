"""Where things lie: a local `Path`, or a `RemotePath`, an object or a directory in an object store.

`RemotePath` has the part of `Path`'s interface that this package uses, so that what takes a `Place` reads the same for
both. It has no `__fspath__`: libraries that open files by name get local copies (see `node_cache`). An object appears
under its name when its last byte is there: stores make an upload visible as a whole.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pydantic_core import core_schema

from simmerge_ray.base.errors import InputError, StorageError, shown_value
from simmerge_ray.base.storage.stores import IncompleteUploadError, error_text, filesystem, retried

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*)://(.*)$", re.DOTALL)
_ALIASES = {"gcs": "gs", "s3a": "s3"}
_RANGE_BYTES, _PART_BYTES = 1 << 26, 1 << 24
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 4096 - 1
# What a store calls the version of an object; the first that it tells counts.
_VERSION_MARKS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "updated", "mtime", "created", "mode")

Result = TypeVar("Result")


@dataclass(frozen=True, order=True)
class RemotePath:
    """A URI without a slash at its end, `.` and `..` resolved. Build it with `as_place`.

    A directory is a prefix of names; it exists while an object lies below it, and needs not be made.
    """

    scheme: str
    key: str  # bucket and name

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __truediv__(self, name: str | Path) -> RemotePath:
        return RemotePath(self.scheme, posixpath.normpath(f"{self.key}/{name}"))

    @property
    def name(self) -> str:
        return self.key.rsplit("/", 1)[-1]

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.scheme, self.key.rsplit("/", 1)[0])

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def with_suffix(self, suffix: str) -> RemotePath:
        return self.with_name(f"{self.stem}{suffix}")

    def is_relative_to(self, other: Place) -> bool:
        return isinstance(other, RemotePath) and f"{self}/".startswith(f"{other}/")

    def relative_to(self, other: Place) -> Path:
        """What is left of the name below `other`. Raises ValueError: it does not lie there."""
        if not self.is_relative_to(other):
            raise ValueError(f"{self} does not lie below {other}")
        return Path(str(self)[len(str(other)) + 1 :])

    def resolve(self) -> RemotePath:
        return self

    def absolute(self) -> RemotePath:
        return self

    def expanduser(self) -> RemotePath:
        return self

    def find(self) -> Entry | None:
        """The object or directory of this name; None where there is none."""
        try:
            return self._entry(self._call("look at", lambda store: store.info(self.key)))
        except FileNotFoundError:
            return None

    def find_object(self) -> Entry:
        """What has this name. Raises FileNotFoundError: nothing has."""
        if (entry := self.find()) is None:
            raise self._absent()
        return entry

    def exists(self) -> bool:
        """Whether an object has this name, or lies below it."""
        return self.find() is not None

    def is_file(self) -> bool:
        entry = self.find()
        return entry is not None and not entry.is_directory

    def is_dir(self) -> bool:
        entry = self.find()
        return entry is not None and entry.is_directory

    def list_children(self) -> list[Entry]:
        """The objects and directories in this directory, sorted; an object itself; none if it is neither."""
        entries = self._list(lambda store: store.ls(self.key, detail=True))
        return [entry for entry in entries if self in (entry.path, entry.path.parent)]

    def list_below(self) -> list[Entry]:
        """All objects below this directory, sorted."""
        entries = self._list(lambda store: store.find(self.key, detail=True).values())
        return [entry for entry in entries if entry.path.is_relative_to(self) and entry.path != self]

    def _list(self, call: Callable[[Any], Iterable[Mapping[str, Any]]]) -> list[Entry]:
        try:
            found = self._call("list", call)
        except FileNotFoundError:
            return []
        return sorted((self._entry(info) for info in found), key=lambda entry: entry.path)

    def iterdir(self) -> Sequence[RemotePath]:
        """Objects and directories in this directory, sorted."""
        return [entry.path for entry in self.list_children() if entry.path != self]

    def glob(self, pattern: str) -> Sequence[RemotePath]:
        """Objects whose name below this directory matches, sorted; `*` stands for no slash."""
        wanted = pattern.split("/")
        found = []
        for entry in self.list_below():
            parts = entry.path.relative_to(self).parts
            if len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)):
                found.append(entry.path)
        return found

    def read_bytes(self) -> bytes:
        return self.read_range(None, None)

    def read_range(self, start: int | None, stop: int | None) -> bytes:
        """Bytes [start, stop) of an object. Raises FileNotFoundError: there is none."""
        try:
            data: bytes = self._call("read", lambda store: store.cat_file(self.key, start=start, end=stop))
        except FileNotFoundError:
            raise self._absent() from None
        if start is not None and stop is not None and len(data) > stop - start:
            return data[start:stop]  # a store without ranges sends all of it
        return data

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> int:
        """Write an object, whole or not at all; one of that name is replaced."""
        self._write(lambda store: store.pipe_file(self.key, data))
        return len(data)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        return self.write_bytes(text.encode(encoding))

    def upload(self, source: Path) -> Entry:
        """Write a local file as this object, in parts where it is large."""
        size = source.stat().st_size
        options: dict[str, Any] = {}
        if self.scheme == "s3":  # memory: parts at the same time; S3 takes 10,000 parts of an object
            options = {"chunksize": max(_PART_BYTES, -(-size // 9000)), "max_concurrency": 4}

        def upload(store: Any) -> Entry:
            store.put_file(str(source), self.key, **options)
            entry = self._entry(store.info(self.key))
            if entry.size != size:
                raise IncompleteUploadError(f"{entry.size} of {size} bytes have arrived")
            return entry

        return self._write(upload)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: directories of an object store are made by what lies in them."""

    def unlink(self, missing_ok: bool = True) -> None:
        """Delete an object; one that is gone already is as wanted."""
        try:
            self._call("delete", lambda store: store.rm_file(self.key))
        except FileNotFoundError:
            return

    def _call(self, action: str, call: Callable[[Any], Result]) -> Result:
        return retried(str(self), action, lambda: call(filesystem(self.scheme)))

    def _write(self, call: Callable[[Any], Result]) -> Result:
        try:
            return self._call("write", call)
        except FileNotFoundError as error:
            raise StorageError(f"cannot write {self}: {error_text(error)}; is there such a bucket?") from None

    def _absent(self) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, "no such object", str(self))

    def _entry(self, info: Mapping[str, Any]) -> Entry:
        path = RemotePath(self.scheme, str(info["name"]).strip("/"))
        if info.get("type") == "directory":
            return Entry(path, 0, "", True)
        marks = [f"{key}={info[key]}" for key in _VERSION_MARKS if info.get(key) is not None]
        return Entry(path, int(info.get("size") or 0), f"{info.get('size')} {marks[0] if marks else ''}")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """In a config: a URI; written as text."""
        return core_schema.no_info_plain_validator_function(
            _checked_remote, serialization=core_schema.to_string_ser_schema()
        )


@dataclass(frozen=True)
class Entry:
    """An object or a directory in a store. version: another one when the object is written again."""

    path: RemotePath
    size: int
    version: str
    is_directory: bool = False

    def download(self, target: Path) -> None:
        """Copy the object into a new local file, range by range, so that an interruption costs one range.

        Raises as `read_range` and `check`; OSError: the file cannot be written.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "wb") as stream:
            for start in range(0, self.size, _RANGE_BYTES):
                stream.write(self.path.read_range(start, min(start + _RANGE_BYTES, self.size)))
        self.check(target.stat().st_size, self.size)

    def check(self, num_bytes: int, wanted: int) -> None:
        """Raises StorageError: a read got not the `wanted` bytes, or the object was written again meanwhile."""
        now = self.path.find()
        if now is None or now.version != self.version or num_bytes != wanted:
            raise StorageError(f"{self.path} was changed while it was read; run again")


# In a config a union is tried from the left: what is no URI is a local path.
Place: TypeAlias = RemotePath | Path


def _checked_remote(value: Any) -> RemotePath:
    if isinstance(value, RemotePath):
        return value
    if isinstance(value, str) and isinstance(place := as_place(value), RemotePath):
        return place
    raise ValueError("not a URI")


def as_place(name: str | Place) -> Place:
    """The place that a path or a URI names; `file://` is a local path.
    Raises InputError: a URI without a bucket, or what no file can be called.
    """
    if not isinstance(name, str):
        return name
    _check_name(name)
    match = _SCHEME.match(name)
    if match is None:
        return Path(name)
    scheme, key = match.group(1).lower(), match.group(2)
    if scheme in ("file", "local"):
        return Path(key)
    key = posixpath.normpath(key.strip("/")) if key.strip("/") else ""
    if not key or key.startswith(".."):
        raise InputError(f"{name!r} names no bucket; expected {scheme}://BUCKET/NAME")
    return RemotePath(_ALIASES.get(scheme, scheme), key)


def _check_name(name: str) -> None:
    """Raises InputError: no file system takes such a name."""
    try:
        parts = os.fsencode(name).split(b"/")
    except UnicodeEncodeError:
        raise InputError(f"{shown_value(name)} has half a surrogate pair in it, which is no character") from None
    if "\0" in name:
        raise InputError(f"{shown_value(name)} has a NUL in it, which no name of a file has")
    if max(map(len, parts)) > _MAX_NAME_BYTES or len(name) > _MAX_PATH_BYTES:
        raise InputError(
            f"{shown_value(name)} is too long for a path ({_MAX_PATH_BYTES} bytes, {_MAX_NAME_BYTES} for each part)"
        )


def list_places(directory: Place, pattern: str) -> list[Place]:
    """Files below a directory whose name there matches, sorted; `*` stands for no slash."""
    return sorted(directory.glob(pattern), key=str)


def nothing_in(directory: Place, what: str) -> str:
    """Why a directory has nothing of what is looked for, in words."""
    return f"{directory} holds no {what}" if directory.is_dir() else f"{directory} is no directory"


def name_below(place: Place, root: Place) -> str:
    """The name of a place below another. Raises ValueError: it does not lie there."""
    if isinstance(root, RemotePath) and not isinstance(place, RemotePath):
        raise ValueError(f"{place} does not lie below {root}")
    return str(place.relative_to(root))  # type: ignore[arg-type]


def place_in(directory: Place, name: str | Place) -> Place:
    """The place that `name` means in a file that lies in `directory`: a URI and an absolute path mean themselves.
    Raises InputError: as `as_place`, or a loop of symbolic links."""
    if not isinstance(name, str | Path | RemotePath):  # of a file that was not checked
        raise InputError(f"a path is text, got {shown_value(name)}")
    place = as_place(name if isinstance(name, RemotePath) else str(name))
    if isinstance(place, RemotePath):
        return place
    if isinstance(directory, RemotePath):
        return place if place.is_absolute() else directory / place
    try:
        return (directory / place).resolve()
    except (OSError, RuntimeError):  # Python 3.13 leaves it to whoever opens it
        raise InputError(f"{place} is a symbolic link that leads back to itself") from None
