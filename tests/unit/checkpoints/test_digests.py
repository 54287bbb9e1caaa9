"""A cached digest is the digest, and the weights are read again whenever the files may have changed."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.checkpoints import digests
from simmerge_ray.checkpoints.digests import cached_digest, checkpoint_digest
from simmerge_ray.checkpoints.references import CheckpointRef
from tests.unit.checkpoints.test_catalogue import write_adapter


@pytest.fixture
def copy(catalogue, tmp_path) -> CheckpointRef:
    shutil.copytree(catalogue.checkpoints[0].path, tmp_path / "copy")
    return CheckpointRef("copy", tmp_path / "copy")


@pytest.fixture
def num_reads(monkeypatch) -> list[str]:
    """Ids of the checkpoints whose bytes were read, in order."""
    reads: list[str] = []

    def counted(ref: CheckpointRef) -> str:
        reads.append(ref.id)
        return checkpoint_digest(ref)

    monkeypatch.setattr(digests, "checkpoint_digest", counted)
    return reads


def flip_last_bit(file: Path) -> None:
    """Change the weights and nothing of the size; a later time of change."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    status = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


def test_a_checkpoint_is_read_once(copy, tmp_path, num_reads):
    found = [cached_digest(copy, tmp_path / "cache") for _ in range(3)]
    found.append(cached_digest(replace(copy, id="another name"), tmp_path / "cache"))
    assert found == [checkpoint_digest(copy)] * 4 and num_reads == ["copy"]


def test_changed_files_are_read_again(copy, tmp_path, num_reads):
    first = cached_digest(copy, tmp_path / "cache")
    flip_last_bit(copy.path / "model.safetensors")
    second = cached_digest(copy, tmp_path / "cache")
    assert second == checkpoint_digest(copy) != first and len(num_reads) == 2


def test_a_changed_adapter_is_read_again(copy, tmp_path, num_reads):
    ref = replace(copy, adapter=write_adapter(tmp_path / "lora"))
    first = cached_digest(ref, tmp_path / "cache")
    assert first != cached_digest(copy, tmp_path / "cache")
    flip_last_bit(tmp_path / "lora" / "adapter_model.safetensors")
    assert cached_digest(ref, tmp_path / "cache") == checkpoint_digest(ref) != first
    assert len(num_reads) == 3


def test_a_checkpoint_elsewhere_is_another_entry(copy, tmp_path, num_reads):
    shutil.copytree(copy.path, tmp_path / "moved")  # keeps the times of change
    moved = replace(copy, path=tmp_path / "moved")
    assert cached_digest(copy, tmp_path / "cache") == cached_digest(moved, tmp_path / "cache")
    assert len(num_reads) == 2 and len(list((tmp_path / "cache").iterdir())) == 2


def test_a_relative_path_is_the_absolute_one(copy, tmp_path, num_reads, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cached_digest(copy, tmp_path / "cache")
    cached_digest(replace(copy, path=Path("copy")), Path("cache"))
    assert len(num_reads) == 1


def test_what_changes_while_it_is_read_is_not_kept(copy, tmp_path, monkeypatch):
    def digest_of_what_is_being_written(ref: CheckpointRef) -> str:
        found = checkpoint_digest(ref)
        flip_last_bit(ref.path / "model.safetensors")
        return found

    monkeypatch.setattr(digests, "checkpoint_digest", digest_of_what_is_being_written)
    cached_digest(copy, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"digest": 3}', b'{"digest": "../../x"}', b"\xff\xfe"])
def test_a_damaged_entry_is_replaced(copy, tmp_path, num_reads, content):
    expected = cached_digest(copy, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_bytes(content)
    assert cached_digest(copy, tmp_path / "cache") == cached_digest(copy, tmp_path / "cache") == expected
    assert len(num_reads) == 2


def test_without_a_cache_directory_it_works(copy, tmp_path, num_reads, monkeypatch):
    (tmp_path / "file").write_text("no directory")
    for _ in range(2):
        assert cached_digest(copy, tmp_path / "file" / "cache") == checkpoint_digest(copy)

    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    assert cached_digest(copy) == checkpoint_digest(copy)
    assert len(num_reads) == 3


def test_concurrent_writers_agree(copy, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: cached_digest(copy, tmp_path / "cache"), range(24)))
    assert found == {checkpoint_digest(copy)}
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"]


def test_what_is_not_there_is_an_error_and_not_an_entry(copy, tmp_path):
    cached_digest(copy, tmp_path / "cache")
    shutil.rmtree(copy.path)
    with pytest.raises(CheckpointError, match="'copy'"):
        cached_digest(copy, tmp_path / "cache")


def test_a_catalogue_s_digests_are_those_of_its_checkpoints(catalogue, tmp_path, num_reads):
    expected = {ref.id: checkpoint_digest(ref) for ref in catalogue.all_refs}
    assert catalogue.digests(tmp_path / "cache") == catalogue.digests(tmp_path / "cache") == expected
    assert num_reads == ["base", "m0", "m1", "m2"]
