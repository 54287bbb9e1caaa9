"""The cache of a node: a limit, whole entries, several processes, kills, a full disk; and ranges read through it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from simmerge_ray.base.errors import ConfigError, StorageError
from simmerge_ray.base.storage import RemotePath, as_place, open_ranges, ranges, write_atomically
from simmerge_ray.base.storage.node_cache import NodeCache, node_cache

KB = 1000


def cache(tmp_path: Path, limit: int = 100 * KB) -> NodeCache:
    return NodeCache(tmp_path / "cache", limit)


def age(made: NodeCache, key: str, seconds: float) -> None:
    """As if an entry had been used so long ago."""
    path = made.root / "entries" / key
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_what_was_put_is_read_and_what_was_used_last_stays(tmp_path):
    made = cache(tmp_path)
    for number in range(8):
        assert made.put(f"e{number}", bytes([number]) * (10 * KB))
        age(made, f"e{number}", 1000 - number)
    room = bytearray(4)
    assert made.read("e0", 9 * KB, memoryview(room)) and room == bytes(4)  # and it is used
    assert not made.read("e0", 10 * KB - 1, memoryview(room)) and not made.read("absent", 0, memoryview(room))
    for number in range(8, 40):
        assert made.put(f"e{number}", bytes(10 * KB))
        age(made, f"e{number}", 1000 - number)
        assert made.num_bytes() <= made.limit_bytes
        made.read("e0", 0, memoryview(room))
    assert made.has("e0") and made.has("e39") and not made.has("e1")
    assert not made.put("large", bytes(101 * KB)), "larger than the cache"
    assert made.has("e39"), "nothing is deleted for what does not fit anyway"
    assert list((made.root / "partial").iterdir()) == []


def fill_slowly(root: Path, log: Path, barrier) -> None:
    def fill(directory: Path) -> None:
        with open(log, "a") as stream:
            stream.write("filled\n")
        for number in range(20):
            (directory / f"{number}").write_bytes(bytes(KB))

    barrier.wait()
    with NodeCache(root, 100 * KB).directory("key", 20 * KB, fill) as directory:
        assert len(list(directory.iterdir())) == 20


def test_several_processes_fill_a_directory_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    arguments = (tmp_path / "cache", tmp_path / "log", barrier)
    processes = [context.Process(target=fill_slowly, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "log").read_text() == "filled\n"
    assert cache(tmp_path).num_bytes() == 20 * KB


def test_a_process_that_is_killed_while_it_fills_leaves_nothing_that_counts(tmp_path):
    made = cache(tmp_path)
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:

        def half(directory: Path) -> None:
            (directory / "half").write_bytes(bytes(KB))
            os.write(writing, b"x")
            signal.pause()

        with made.directory("key", 60 * KB, half):
            os._exit(1)
    os.read(reading, 1)
    assert not made.has("key") and made.num_bytes() == 60 * KB, "room is counted while it is being filled"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with made.directory("key", 60 * KB, lambda target: [(target / "whole").write_bytes(bytes(60 * KB))]) as found:
        assert [path.name for path in found.iterdir()] == ["whole"]
    assert made.put("other", bytes(30 * KB))
    assert made.num_bytes() == 90 * KB and list((made.root / "partial").iterdir()) == []


def test_a_directory_in_use_is_not_deleted(tmp_path):
    made = cache(tmp_path)
    with made.directory("used", 60 * KB, lambda target: [(target / "x").write_bytes(bytes(60 * KB))]) as found:
        age(made, "used", 1000)
        for number in range(9):
            made.put(f"e{number}", bytes(10 * KB))
        assert (found / "x").stat().st_size == 60 * KB and made.num_bytes() <= made.limit_bytes
        with (
            pytest.raises(StorageError, match=r"no room: 0.000 GB are needed .*SIMMERGE_CACHE_GB.*in use"),
            made.directory("second", 50 * KB, lambda target: None),
        ):
            pass
    assert made.put("large", bytes(90 * KB)) and not made.has("used")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_gone_past_and_said_where_there_is_no_way_past(small_disk):
    made = NodeCache(small_disk / "cache", 100_000 * KB)
    assert made.put("small", bytes(500 * KB))
    assert not made.put("large", bytes(3000 * KB))
    room = bytearray(8)
    assert made.read("small", 0, memoryview(room)) and not made.has("large")
    assert list((made.root / "partial").iterdir()) == []
    with (
        pytest.raises(StorageError, match=r"No space left on device; 0.003 GB are needed below .*SIMMERGE_CACHE_DIR"),
        made.directory("dir", 3000 * KB, lambda target: [(target / "x").write_bytes(bytes(3000 * KB))]),
    ):
        pass
    assert made.put("again", bytes(500 * KB)), "the room was given back"


@pytest.fixture
def counted(monkeypatch):
    """Requests of ranges that were made."""
    seen: list[tuple[int, int]] = []
    original = RemotePath.read_range

    def read(place, start, stop):
        seen.append((start, stop))
        return original(place, start, stop)

    monkeypatch.setattr(RemotePath, "read_range", read)
    return seen


@pytest.fixture
def large_object(bucket):
    data = np.random.default_rng(1).integers(0, 256, 20 * ranges.BLOCK_BYTES + 1234, dtype=np.uint8).tobytes()
    write_atomically(f"{bucket}/weights", data)
    return as_place(f"{bucket}/weights"), data


def test_ranges_of_an_object_are_its_bytes_with_few_requests(large_object, counted, tmp_path, monkeypatch):
    monkeypatch.setenv("SIMMERGE_CACHE_DIR", str(tmp_path / "cache"))
    place, data = large_object
    reader = open_ranges(place)
    room = bytearray(3 << 20)
    for start in range(0, len(data), len(room)):
        num_bytes = reader.read_into(start, memoryview(room), len(data))
        assert room[:num_bytes] == data[start : start + num_bytes]
    assert len(counted) == 2, "sixteen blocks a request"
    assert reader.read_into(len(data) - 5, memoryview(room), len(data)) == 5
    reader.close()
    other = open_ranges(place)
    assert other.read_into(ranges.BLOCK_BYTES - 7, memoryview(room)[:14], 0) == 14
    assert room[:14] == data[ranges.BLOCK_BYTES - 7 : ranges.BLOCK_BYTES + 7]
    assert len(counted) == 2, "another reader of the node finds what is there"


def test_what_is_not_asked_for_is_not_fetched(large_object, counted, tmp_path, monkeypatch):
    monkeypatch.setenv("SIMMERGE_CACHE_DIR", str(tmp_path / "cache"))
    place, _ = large_object
    start = 5 * ranges.BLOCK_BYTES + 10
    open_ranges(place).read_into(start, memoryview(bytearray(100)), start + 2 * ranges.BLOCK_BYTES)
    assert counted == [(5 * ranges.BLOCK_BYTES, 8 * ranges.BLOCK_BYTES)]


def test_ranges_go_past_a_full_disk(large_object, small_disk, monkeypatch):
    monkeypatch.setenv("SIMMERGE_CACHE_DIR", str(small_disk))
    place, data = large_object
    room = bytearray(1 << 20)
    reader = open_ranges(place)
    for start in range(0, 6 * ranges.BLOCK_BYTES, len(room)):
        reader.read_into(start, memoryview(room), len(data))
        assert room == data[start : start + len(room)]


def test_an_object_that_is_written_again_is_not_mixed_with_the_old_one(large_object, tmp_path, monkeypatch):
    monkeypatch.setenv("SIMMERGE_CACHE_DIR", str(tmp_path / "cache"))
    place, data = large_object
    room = bytearray(10)
    reader = open_ranges(place)
    reader.read_into(0, memoryview(room), 10)
    write_atomically(place, data[::-1])
    with pytest.raises(StorageError, match="was changed while it was read"):
        reader.read_into(18 * ranges.BLOCK_BYTES, memoryview(room), 0)
    assert open_ranges(place).read_into(0, memoryview(room), 0) == 10 and room == data[::-1][:10]


def test_the_limit_of_the_environment_is_checked(monkeypatch):
    monkeypatch.setenv("SIMMERGE_CACHE_GB", "0.5")
    assert node_cache().limit_bytes == 500_000_000
    monkeypatch.setenv("SIMMERGE_CACHE_GB", "all")
    with pytest.raises(ConfigError, match="SIMMERGE_CACHE_GB is 'all'; expected a number of GB"):
        node_cache()
