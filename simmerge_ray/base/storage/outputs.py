"""What a command will write is looked at before it works: no run of an hour ends at a place that takes nothing."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from simmerge_ray.base.errors import OutputError, problem_list
from simmerge_ray.base.storage.objects import file_names, open_file
from simmerge_ray.base.storage.places import Place, RemotePath

_READ_ONLY = {
    "hf": "the hub is not written to directly: name a local directory, then `hf upload OWNER/NAME DIRECTORY`",
    "http": "no file can be written there: name a path, or a URI such as s3://bucket/run",
}
_READ_ONLY["https"] = _READ_ONLY["http"]
_MAX_NAMES = 3


@dataclass(frozen=True)
class Output:
    """A file or a directory that a command will write; missing parents are made by it.

    Args:
        shown: what the user calls it.
        is_file: or a directory.
        marks: names of which one lies in such a directory when the same command has made it. Without marks the command
            adds to a directory and replaces nothing that is not its own.
        starts: first bytes of such a file; one that begins otherwise is not replaced.
        kind: for messages, what it is that has these marks.
    """

    place: Place
    shown: str = "--out"
    is_file: bool = False
    marks: tuple[str, ...] = ()
    starts: bytes = b""
    kind: str = ""


def check_outputs(outputs: Iterable[Output], inputs: Mapping[str, Place | None] | None = None) -> None:
    """Look at everything that a command will write, without leaving anything there.

    inputs: what is read, by what the user calls it.

    Raises:
        OutputError: all problems: a directory where a file is needed, or the reverse; below a file; not writable; holds
            what the command did not make; the same as an input or another output; a URI that is read-only.
        StorageError: a store does not take it.
    """
    listed = list(outputs)
    given = {name: place for name, place in (inputs or {}).items() if place is not None}
    problems = [problem for one in listed if (problem := _problem(one, given)) is not None]
    for first, second in combinations(listed, 2):
        if _resolved(first.place) == _resolved(second.place):
            problems.append(f"{first.shown} and {second.shown} would both be {first.place}")
    if problems:
        raise OutputError(problem_list(problems[0], problems[1:]))
    for one in listed:
        if isinstance(one.place, RemotePath):
            probe = (one.place.parent if one.is_file else one.place) / f".simmerge-{uuid.uuid4().hex}"
            probe.write_bytes(b"")
            probe.unlink()


def _problem(output: Output, inputs: Mapping[str, Place]) -> str | None:
    name = f"{output.shown} {output.place}"
    if isinstance(output.place, RemotePath) and output.place.scheme in _READ_ONLY:
        return f"{name}: {_READ_ONLY[output.place.scheme]}"
    own = _resolved(output.place)
    for shown, place in inputs.items():
        if (read := _resolved(place)) == own:
            return f"{name} is also {shown}, which is read; name another place"
        if output.marks and _lies_below(read, own):
            return f"{name} would be replaced, and {shown} ({place}) lies in it; name another place"
    return _foreign(output, name) or (None if isinstance(own, RemotePath) else _refusal(output, own, name))


def _foreign(output: Output, name: str) -> str | None:
    """What is there and was not made by the command."""
    there = (file_names(output.place) if output.marks else None) or set()
    if there and not there.intersection(output.marks):
        some = ", ".join(sorted(there)[:_MAX_NAMES]) + (", ..." if len(there) > _MAX_NAMES else "")
        return f"{name} exists and is not {output.kind} (it holds {some}); choose another directory or remove it"
    if output.starts and isinstance(output.place, Path) and output.place.is_file():
        with open_file(output.place) as stream:
            if stream.read(len(output.starts)) not in (b"", output.starts):
                return f"{name} exists and is not {output.kind}; choose another file or remove it"
    return None


def _refusal(output: Output, path: Path, name: str) -> str | None:
    """Why a local path cannot be written."""
    if output.is_file and path.is_dir():
        return f"{name} is a directory; name a file"
    if not output.is_file and path.exists() and not path.is_dir():
        return f"{name} is a file; name a directory"
    there = path.parent if output.is_file or output.marks else path  # what is replaced is written beside it
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return f"{name} lies below {there}, which is a file"
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return f"{name}: cannot write into {there}: {error.strerror}"


def _resolved(place: Place) -> Place:
    return place if isinstance(place, RemotePath) else Path(os.path.realpath(place))


def _lies_below(place: Place, directory: Place) -> bool:
    return type(place) is type(directory) and place.is_relative_to(directory)  # type: ignore[arg-type]
