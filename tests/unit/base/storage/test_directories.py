"""Directories in a store are whole or absent, whoever writes and reads them at the same time."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import fsspec
import pytest

from simmerge_ray.base.errors import StorageError
from simmerge_ray.base.storage import (
    RemotePath,
    as_place,
    delete_objects,
    directories,
    filled_in_place,
    local_directory,
    new_directory,
    upload_directory,
    write_atomically,
)
from simmerge_ray.base.storage.directories import CONTENTS, is_complete


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMMERGE_CACHE_DIR", str(tmp_path / "cache"))


def read(place) -> dict[str, str]:
    with local_directory(place) as directory:
        return {
            str(path.relative_to(directory)): path.read_text()
            for path in directory.rglob("*")
            if path.is_file() and path.name != CONTENTS
        }


def write(place, files: dict[str, str]) -> None:
    with new_directory(place) as directory:
        for name, text in files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(text)


def test_a_directory_is_replaced_as_a_whole_and_nothing_else_is_touched(bucket):
    place = as_place(bucket) / "selector"
    write_atomically(place / "notes.txt", b"a person's own")
    with pytest.raises(RuntimeError), new_directory(place) as directory:
        (directory / "half").write_text("x")
        raise RuntimeError
    assert not is_complete(place) and not (place / "half").exists()
    write(place, {"a": "1", "b": "1", "sub/c": "1"})
    assert is_complete(place) and read(place) == {"a": "1", "b": "1", "sub/c": "1"}
    write(place, {"a": "2", "sub/c": "2"})
    assert read(place) == {"a": "2", "sub/c": "2"} and not (place / "b").exists()
    assert (place / "notes.txt").read_text() == "a person's own"


def test_an_upload_that_breaks_off_leaves_a_directory_that_nobody_takes(bucket, tmp_path, monkeypatch):
    place = as_place(bucket) / "merged"
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("first")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).rename(source / name)
    upload_directory(source, place, last="config.json")
    assert read(place) == {"config.json": "first", "model.safetensors": "first"}
    (source / "model.safetensors").write_text("second")
    original = RemotePath.upload

    def broken(target, path: Path):
        if path.name == "config.json":
            raise StorageError("away")
        return original(target, path)

    monkeypatch.setattr(RemotePath, "upload", broken)
    with pytest.raises(StorageError, match="away"):
        upload_directory(source, place, last="config.json")
    assert not is_complete(place) and not (place / "config.json").exists(), "no checkpoint for any program"
    monkeypatch.undo()
    upload_directory(source, place, last="config.json")
    assert read(place)["model.safetensors"] == "second"


def test_what_does_not_agree_with_its_list_is_refused(bucket, monkeypatch):
    monkeypatch.setattr(directories, "_PAUSE_S", 0.01)
    place = as_place(bucket) / "selector"
    write(place, {"a": "1", "b": "1"})
    write_atomically(place / "b", b"2")
    with pytest.raises(StorageError, match=f"does not agree with its {CONTENTS}: b is another file"):
        read(place)
    delete_objects([str(place / "b")])
    with pytest.raises(StorageError, match="b is absent"):
        read(place)
    delete_objects([str(place / CONTENTS)])
    assert read(place) == {"a": "1"}, "what others have copied has no list"
    with pytest.raises(FileNotFoundError):
        read(as_place(bucket) / "absent")
    write_atomically(place / CONTENTS, json.dumps([]).encode())
    with pytest.raises(StorageError, match="is damaged; delete it"):
        read(place)


def test_a_stage_fills_a_local_directory_itself_and_a_copy_for_a_store(bucket, tmp_path):
    for place in (tmp_path / "out", as_place(bucket) / "out"):
        with filled_in_place(place) as directory:
            directory.mkdir(exist_ok=True)
            (directory / "x").write_text("1")
        assert read(place) == {"x": "1"}
    with filled_in_place(tmp_path / "out") as directory:
        assert directory == tmp_path / "out"


def write_in_turns(uri: str, mark: str, barrier) -> None:
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # of the process that was forked
    barrier.wait()
    for _ in range(3):
        write(as_place(uri), {name: mark for name in "abcdef"})


def test_writers_at_the_same_time_end_with_one_whole_directory(bucket):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    uri = f"{bucket}/selector"
    processes = [context.Process(target=write_in_turns, args=(uri, mark, barrier)) for mark in "12"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    found = read(as_place(uri))
    assert found in ({name: "1" for name in "abcdef"}, {name: "2" for name in "abcdef"})
