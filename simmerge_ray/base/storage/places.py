"""Where things lie: a local `Path`, or a `RemotePath`, the name of an object or a directory in an object store.

`RemotePath` has the part of `Path`'s interface that this package uses, so that what takes a `Place` reads the same for
both. It has no `__fspath__`: libraries that open files by name get local copies (see `node_cache`).
"""

from __future__ import annotations

import fnmatch
import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from simmerge_ray.base.errors import ConfigError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*)://(.*)$", re.DOTALL)
_ALIASES = {"gcs": "gs", "s3a": "s3"}


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
        """What is left of the name below `other`.

        Raises:
            ValueError: it does not lie there.
        """
        if not self.is_relative_to(other):
            raise ValueError(f"{self} does not lie below {other}")
        return Path(str(self)[len(str(other)) + 1 :])

    def resolve(self) -> RemotePath:
        return self

    def absolute(self) -> RemotePath:
        return self

    def expanduser(self) -> RemotePath:
        return self

    def exists(self) -> bool:
        """Whether an object has this name, or lies below it."""
        from simmerge_ray.base.storage.stores import find

        return find(self) is not None

    def is_file(self) -> bool:
        from simmerge_ray.base.storage.stores import find

        found = find(self)
        return found is not None and not found.is_directory

    def is_dir(self) -> bool:
        from simmerge_ray.base.storage.stores import find

        found = find(self)
        return found is not None and found.is_directory

    def iterdir(self) -> Sequence[RemotePath]:
        """Objects and directories in this directory, sorted."""
        from simmerge_ray.base.storage.stores import list_children

        return [entry.path for entry in list_children(self) if entry.path != self]

    def glob(self, pattern: str) -> Sequence[RemotePath]:
        """Objects whose name below this directory matches, sorted; `*` stands for no slash."""
        from simmerge_ray.base.storage.stores import list_below

        wanted = pattern.split("/")
        found = []
        for entry in list_below(self):
            parts = str(entry.path.relative_to(self)).split("/")
            if len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)):
                found.append(entry.path)
        return sorted(found)

    def read_bytes(self) -> bytes:
        from simmerge_ray.base.storage.stores import read_object

        return read_object(self)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> int:
        from simmerge_ray.base.storage.stores import write_object

        write_object(self, data)
        return len(data)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        return self.write_bytes(text.encode(encoding))

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: directories of an object store are made by what lies in them."""

    def unlink(self, missing_ok: bool = False) -> None:
        from simmerge_ray.base.storage.stores import delete_object

        delete_object(self)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """In a config: a URI; written as text."""
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            _checked_remote, serialization=core_schema.to_string_ser_schema()
        )


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

    Raises:
        InputError: a URI without a bucket.
    """
    if not isinstance(name, str):
        return name
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


def list_places(directory: Place, pattern: str) -> list[Place]:
    """Files below a directory whose name there matches, sorted; `*` stands for no slash."""
    return sorted(directory.glob(pattern), key=str)


def name_below(place: Place, root: Place) -> str:
    """The name of a place below another.

    Raises:
        ValueError: it does not lie there.
    """
    if isinstance(place, RemotePath):
        return str(place.relative_to(root))
    if isinstance(root, RemotePath):
        raise ValueError(f"{place} does not lie below {root}")
    return str(place.relative_to(root))


def place_in(directory: Place, name: str | Place) -> Place:
    """The place that `name` means in a file that lies in `directory`: a URI and an absolute path mean themselves."""
    place = as_place(name)
    if isinstance(place, RemotePath):
        return place
    if isinstance(directory, RemotePath):
        return place if place.is_absolute() else directory / place
    return (directory / place).resolve()


def number_in_environment(variable: str, default: float, unit: str) -> float:
    """A number, 0 or more, that an environment variable may set.

    Raises:
        ConfigError: it sets something else.
    """
    text = os.environ.get(variable)
    try:
        number = default if text is None else float(text)
    except ValueError:
        number = -1.0
    if not number >= 0:
        raise ConfigError(f"{variable} is {text!r}; expected a number of {unit}")
    return number
