"""Single files and objects that are either whole or absent, and digests.

Names are paths or URIs. Local files are written through a temporary sibling and a rename, objects of a store by one
upload, which is atomic there.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from simmerge_ray.base.errors import InputError
from simmerge_ray.base.storage.places import Place, RemotePath, as_place

_PIECE_BYTES = 1 << 24


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
    """All bytes of a file or object. Raises FileNotFoundError: there is none."""
    return as_place(uri).read_bytes()


def read_json(uri: str | Place) -> Any:
    """Parse an object as JSON."""
    return json.loads(read_bytes(uri))


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
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}") from None
    except UnicodeDecodeError:
        raise error(f"{path} is not UTF-8 text") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise error(f"{path}, line {number}: not JSON") from None
        if not isinstance(row, dict):
            raise error(f"{path}, line {number}: expected an object, got {type(row).__name__}")
        yield number, row


def jsonl_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """JSONL bytes of the rows, in the given key order."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
