"""Loops as machine code on disk: made once for each kind of arguments; again where damaged, or on another CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from simmerge_ray.merging.engine import machine_code
from simmerge_ray.merging.engine.machine_code import Loop
from tests.unit.test_layers import loaded_modules

ONES, HALVES = np.ones(70, dtype=np.float32), np.full(70, 0.5, dtype=np.float32)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_code, "_directory", lambda: tmp_path)
    return tmp_path


def half(values: np.ndarray | None = None) -> list[float]:
    """1 - 1/2, by a loop that was not linked yet."""
    values = ONES.copy() if values is None else values
    Loop("subtract")(values, HALVES)
    return values.tolist()


def test_code_is_made_once_and_a_damaged_file_is_made_again(directory):
    assert half() == HALVES.tolist()
    (file,) = directory.iterdir()
    made, written = file.read_bytes(), file.stat().st_mtime_ns
    assert half() == HALVES.tolist() and file.stat().st_mtime_ns == written
    for damaged in (made[:-7], made[:-1] + bytes([made[-1] ^ 1]), b"", b"{}\n", b"\xff\n" + made):
        file.write_bytes(damaged)
        assert half() == HALVES.tolist()
        assert file.read_bytes().partition(b"\n")[2]  # whole again


def test_another_cpu_has_an_entry_of_its_own(directory, monkeypatch):
    half()
    before = {path: path.read_bytes() for path in directory.iterdir()}
    made_by = machine_code._made_by()
    monkeypatch.setattr(machine_code, "_made_by", lambda: made_by + "another")
    half()
    after = {path: path.read_bytes() for path in directory.iterdir()}
    assert len(after) == 2 and before.items() <= after.items()


def test_threads_that_call_a_new_loop_at_the_same_time(directory):
    subtract, inputs = Loop("subtract"), [ONES.copy() for _ in range(8)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda values: subtract(values, HALVES), inputs))
    assert all((values == HALVES).all() for values in inputs) and len(list(directory.iterdir())) == 1


@pytest.mark.parametrize("wrong", [np.ones((3, 2), dtype=np.float32), np.ones(9, dtype=np.float32)[::3]])
def test_what_a_loop_cannot_walk_through_is_refused(wrong):
    with pytest.raises(TypeError, match="contiguous arrays of one dimension"):
        half(wrong)


def test_linked_code_needs_no_compiler():
    half()
    call = "from simmerge_ray.merging.engine import kernels; kernels.subtract(*numpy.ones((2, 9), 'f'))"
    (loaded,) = loaded_modules([f"import numpy; {call}"])
    assert "llvmlite" in loaded and not loaded & {"numba", "scipy", "torch"}
