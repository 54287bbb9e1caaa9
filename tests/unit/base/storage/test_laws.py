"""Laws of places and objects over generated names and contents, on a disk and in a store in memory."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmerge_ray.base.storage import (
    Place,
    as_place,
    delete_objects,
    digest_file,
    file_names,
    file_size,
    list_objects,
    list_places,
    local_directory,
    name_below,
    new_directory,
    objects,
    open_ranges,
    place_in,
    read_bytes,
    read_range,
    write_atomically,
)

KINDS = ("disk", "store")
# Names that people give to files, without those that a path would resolve and those that are hidden.
PART = st.text("abXY09-_. é=+@%", min_size=1, max_size=8).map(lambda text: f"n{text}n")
NAME = st.lists(PART, min_size=1, max_size=4).map("/".join)
FILES = st.dictionaries(st.tuples(PART, PART.map(lambda name: f"{name}.bin")).map("/".join), st.binary(max_size=64))
DATA = st.binary(max_size=200)


@contextmanager
def directory(kind: str) -> Iterator[Place]:
    """A new one."""
    if kind == "store":
        yield as_place(f"memory://laws/{uuid.uuid4().hex}")
    else:
        with tempfile.TemporaryDirectory() as path:
            yield Path(path)


@given(NAME, NAME)
def test_a_name_is_joined_and_taken_apart_as_a_path_is(first, second):
    remote, local = as_place("s3://bucket") / first, Path("/bucket") / first
    for part in ("name", "stem", "suffix"):
        assert getattr(remote / second, part) == getattr(local / second, part)
    assert (remote / second).relative_to(remote) == (local / second).relative_to(local) == Path(second)
    assert name_below(remote / second, remote) == name_below(local / second, local) == second
    assert (remote / second).is_relative_to(remote) and not remote.is_relative_to(remote / second)
    assert as_place(str(remote / second)) == remote / second
    assert place_in(remote, second) == remote / second and place_in(remote, str(remote)) == remote
    assert (remote / second).parent / (remote / second).name == remote / second


@pytest.mark.parametrize("kind", KINDS)
@given(name=NAME, first=DATA, second=DATA)
def test_what_was_written_last_is_read(kind, name, first, second):
    with directory(kind) as root:
        place = root / name
        assert not place.exists()
        for data in (first, second):
            write_atomically(place, data)
            assert read_bytes(str(place)) == data and file_size(place) == len(data)
            assert place.is_file() and place.parent.is_dir()
        delete_objects([str(place)])
        assert not place.exists()
        with pytest.raises(FileNotFoundError):
            read_bytes(place)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(files=FILES)
def test_a_directory_lists_what_was_written_below_it_and_nothing_else(kind, files):
    with directory(kind) as root:
        for name, data in files.items():
            write_atomically(root / "here" / name, data)
            write_atomically(root / "here2" / name, data)
        here = root / "here"
        assert [name_below(place, here) for place in list_places(here, "*/*.bin")] == sorted(files)
        assert (file_names(here) or set()) == {name.split("/")[0] for name in files}
        for folder in {name.split("/")[0] for name in files}:
            listed = [name.rsplit("/", 1)[1] for name in list_objects(here / folder, ".bin")]
            assert listed == sorted(name.split("/")[1] for name in files if name.startswith(f"{folder}/"))
            assert list_objects(here / folder, ".txt") == []


@pytest.mark.parametrize("kind", KINDS)
@given(data=DATA, size=st.integers(1, 300), cuts=st.tuples(st.integers(0, 200), st.integers(0, 200)))
def test_digests_and_ranges_do_not_depend_on_how_they_are_read(kind, data, size, cuts):
    start, stop = sorted(cuts)
    with directory(kind) as root, pytest.MonkeyPatch.context() as patch:
        write_atomically(root / "x", data)
        digest = digest_file(root / "x")
        patch.setattr(objects, "_PIECE_BYTES", size)
        assert digest_file(root / "x") == digest
        write_atomically(root / "y", data)
        assert digest_file(root / "y") == digest
        inside = sorted(min(cut, len(data)) for cut in cuts)
        assert read_range(root / "x", *inside) == data[slice(*inside)]
        room = bytearray(stop - start)
        reader = open_ranges(root / "x")
        read = reader.read_into(start, memoryview(room), stop)
        reader.close()
        assert room[: max(0, read)] == data[start:stop]


@settings(max_examples=25)
@given(first=FILES, second=FILES)
def test_a_directory_is_the_last_one_that_was_written(first, second):
    """On a disk; test_directories.py has a store, whose objects need versions, which those in memory have not."""
    with directory("disk") as root:
        for files in (first, second):
            with new_directory(root / "out") as target:
                for name, data in files.items():
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    (target / name).write_bytes(data)
        with local_directory(root / "out") as found:
            held = {str(path.relative_to(found)): path for path in found.rglob("*") if path.is_file()}
            assert {name: path.read_bytes() for name, path in held.items() if "/" in name} == second
