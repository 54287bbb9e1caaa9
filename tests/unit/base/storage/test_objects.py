"""Files and directories are whole or absent; manifests decide what runs again."""

from __future__ import annotations

import subprocess

import pytest

from simmerge_ray.base.errors import TaskError
from simmerge_ray.base.storage import (
    Manifest,
    digest_bytes,
    digest_file,
    digest_json,
    jsonl_bytes,
    list_objects,
    new_directory,
    read_bytes,
    read_json,
    read_jsonl,
    write_atomically,
    write_json,
)


def test_written_objects_are_read_back_and_listed(tmp_path):
    for uri in (f"{tmp_path}/a/b.json", "memory://store/b.json"):
        write_json(uri, {"x": 1})
        assert read_json(uri) == {"x": 1}
        assert [name.rsplit("/", 1)[1] for name in list_objects(uri.rsplit("/", 1)[0], ".json")] == ["b.json"]
    assert list_objects(tmp_path / "absent", ".json") == []
    for directory in (tmp_path / ".hidden" / "runs", tmp_path / "a" / ".." / "b"):
        write_atomically(directory / "x.json", b"{}")
        (directory / ".partial.json").write_text("half")
        assert [name.rsplit("/", 1)[1] for name in list_objects(directory, ".json")] == ["x.json"]


def test_a_failed_write_leaves_the_old_object_and_no_other(tmp_path, monkeypatch):
    write_atomically(tmp_path / "x", b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "x", b"new")
    assert read_bytes(tmp_path / "x") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_directory_appears_only_when_complete(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), new_directory(target) as partial:
        (partial / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for content in ("first", "second"):
        with new_directory(target) as partial:
            (partial / "file").write_text(content)
        assert (target / "file").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_run_are_removed_by_the_next(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    for owner in (ended.pid, "old", 10**30):
        (tmp_path / f".out.{owner}.partial").mkdir()
    with new_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_process_is_filling_is_left_alone(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as other:
        (theirs := tmp_path / f".out.{other.pid}.partial").mkdir()
        with new_directory(tmp_path / "out") as partial:
            (partial / "file").write_text("x")
        other.kill()
        assert theirs.exists()


def test_digests_see_borders_and_ignore_key_order(tmp_path):
    assert digest_bytes(b"ab", b"c") != digest_bytes(b"a", b"bc")
    assert digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1})
    (tmp_path / "f").write_bytes(b"abc")
    assert digest_file(tmp_path / "f") != digest_file(__file__)
    with pytest.raises(ValueError):
        digest_json(float("nan"))


def test_a_manifest_is_current_only_for_its_own_config_and_inputs(tmp_path):
    manifest = Manifest("stage", {"n": 1}, {"file": "d1"})
    path = tmp_path / "m.json"
    assert not manifest.is_current(path)
    manifest.write(path, 1.5, {"rows": 3})
    assert manifest.is_current(path)
    assert not Manifest("stage", {"n": 2}, {"file": "d1"}).is_current(path)
    assert not Manifest("stage", {"n": 1}, {"file": "d2"}).is_current(path)
    content = read_json(path)
    assert content["seconds"] == 1.5 and content["results"] == {"rows": 3} and "python" in content["versions"]
    path.write_text("{")
    assert not manifest.is_current(path)


def test_jsonl_errors_name_file_and_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(jsonl_bytes([{"a": "é"}]) + b"\n")
    assert list(read_jsonl(path, TaskError)) == [(1, {"a": "é"})]
    path.write_text('{"a": 1}\nnot json\n')
    with pytest.raises(TaskError, match=r"t.jsonl, line 2: not JSON"):
        list(read_jsonl(path, TaskError))
    path.write_text("[1]\n")
    with pytest.raises(TaskError, match="expected an object, got list"):
        list(read_jsonl(path, TaskError))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TaskError, match="UTF-8"):
        list(read_jsonl(path, TaskError))
    with pytest.raises(TaskError, match="cannot read"):
        list(read_jsonl(tmp_path / "absent", TaskError))
