"""Single files and objects that are either whole or absent, and digests.

Names are paths or URIs. Local files are written through a temporary sibling and a rename, objects of a store by one
upload, which is atomic there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from simmerge_ray.base.errors import InputError
from simmerge_ray.base.json_text import MAX_JSON_BYTES, JsonError, parse_json
from simmerge_ray.base.storage.places import Place, RemotePath, as_place

_PIECE_BYTES = 1 << 24
_MAX_JSONL_BYTES = 1 << 30


def digest_bytes(*parts: bytes) -> str:
    """Hex BLAKE2b-128 of the parts, each preceded by its length, so that their borders count."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: the text that digests are taken of. Refuses NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_json(value: Any) -> str:
    """Digest of a JSON value, independent of the order of its keys."""
    return digest_bytes(canonical_json(value).encode())


def digest_file(path: str | Place) -> str:
    """Digest of a file's or object's bytes, read in pieces."""
    state = hashlib.blake2b(digest_size=16)
    place = as_place(path)
    if not isinstance(place, RemotePath):
        with open(place, "rb") as stream:
            return hashlib.file_digest(stream, lambda: state).hexdigest()
    size = place.find_object().size
    for start in range(0, size, _PIECE_BYTES):
        state.update(place.read_range(start, min(start + _PIECE_BYTES, size)))
    return state.hexdigest()


def write_atomically(uri: str | Place, data: bytes) -> None:
    """Write `data` under `uri` so that a reader sees all of it or nothing; an existing object is replaced."""
    target = as_place(uri)
    if isinstance(target, RemotePath):
        target.write_bytes(data)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_json(uri: str | Place, value: Any) -> None:
    """Write indented JSON, whole or not at all."""
    write_atomically(uri, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_bytes(uri: str | Place) -> bytes:
    """All bytes of a file or object. Raises FileNotFoundError: there is none. OSError: see `open_file`."""
    place = as_place(uri)
    if isinstance(place, RemotePath):
        return place.read_bytes()
    with open_file(place) as stream:
        return stream.read()


def open_file(path: Path) -> BinaryIO:
    """A local file, to be read. Raises OSError: there is none, or it is a FIFO or a device, which might never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # of a FIFO this waits for no writer
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def read_text(uri: str | Place, max_bytes: int = MAX_JSON_BYTES) -> str:
    """A text file in UTF-8. Raises OSError: as `read_bytes`, or it is too long. UnicodeDecodeError: it is no text."""
    place = as_place(uri)
    if not isinstance(place, RemotePath):
        with open_file(place) as stream:
            if os.fstat(stream.fileno()).st_size > max_bytes:
                raise OSError(errno.EFBIG, f"larger than {max_bytes} bytes", str(place))
            return stream.read().decode()
    return place.read_bytes().decode()


def read_json(uri: str | Place) -> Any:
    """Parse a file or object as JSON. Raises OSError: as `read_text`. JsonError."""
    try:
        return parse_json(read_text(uri))
    except UnicodeDecodeError as error:
        raise JsonError(f"byte {error.start} is no UTF-8") from None


def read_json_object(place: Place, refuse: Callable[[str], InputError]) -> dict[str, Any]:
    """The object in a JSON file. Raises what `refuse` makes of the problem: unreadable, not JSON, or no object."""
    try:
        value = read_json(place)
    except OSError as error:
        raise refuse(f"cannot read {place}: {error.strerror}") from None
    except JsonError as error:
        raise refuse(f"{place} is {error}") from None
    if not isinstance(value, dict):
        raise refuse(f"{place} holds {type(value).__name__}, a JSON object is needed")
    return value


def file_version(place: Place) -> str:
    """Text that changes when a file or object is written again. Raises FileNotFoundError: there is none."""
    if isinstance(place, RemotePath):
        return place.find_object().version
    status = place.stat()
    return f"{status.st_size}\0{status.st_mtime_ns}"


def file_size(place: Place) -> int:
    """Bytes of a file or object. Raises FileNotFoundError: there is none."""
    if isinstance(place, RemotePath):
        return place.find_object().size
    return place.stat().st_size


def file_names(directory: Place) -> set[str] | None:
    """Names of what lies in a directory; None where there is no directory."""
    if isinstance(directory, RemotePath):
        return {path.name for path in directory.iterdir()} or None
    try:
        return set(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            return None
        raise


def list_objects(uri: str | Place, suffix: str) -> list[str]:
    """Full names of the objects in a directory that end in `suffix`, sorted; none if there is none."""
    place = as_place(uri)
    if isinstance(place, RemotePath):
        paths: list[Place] = [entry.path for entry in place.list_children() if not entry.is_directory]
    else:
        paths = [*_files(place)]
    return [_uri(path) for path in paths if path.name.endswith(suffix) and not path.name.startswith(".")]


def list_leftovers(uri: str | Place, older_than_s: float = 60.0) -> list[str]:
    """Full names of temporary files that a killed `write_atomically` left in a directory, sorted; stores have none.

    A younger one may belong to a writer that is at work.
    """
    place = as_place(uri)
    if isinstance(place, RemotePath):
        return []
    found = []
    for path in _files(place):
        if path.name.startswith(".") and path.name.endswith(".partial"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > older_than_s:
                    found.append(_uri(path))
    return found


def _uri(path: Place) -> str:
    return str(path) if isinstance(path, RemotePath) else f"file://{path}"


def _files(directory: Path) -> list[Path]:
    """Absolute paths of the files in a directory, sorted; of a file itself."""
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if entry.is_file()]
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        return [Path(os.path.abspath(directory))]
    return [Path(os.path.abspath(directory)) / name for name in sorted(names)]


def delete_objects(uris: Iterable[str]) -> None:
    """Delete objects one by one; one that is gone already is as wanted."""
    for uri in uris:
        as_place(uri).unlink(missing_ok=True)


def read_jsonl(path: Place, error: type[InputError]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every non-empty line of a JSONL file; raises `error` naming file and line."""
    try:
        lines = read_text(path, _MAX_JSONL_BYTES).split("\n")  # JSON has other ends of lines inside its strings
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}") from None
    except UnicodeDecodeError:
        raise error(f"{path} is not UTF-8 text") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except JsonError as problem:
            raise error(f"{path}, line {number}: {problem}") from None
        if not isinstance(row, dict):
            raise error(f"{path}, line {number}: expected an object, got {type(row).__name__}")
        yield number, row


def jsonl_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """JSONL bytes of the rows, in the given key order."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
