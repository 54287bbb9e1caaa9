"""Checkpoints of `.bin` files: converted once, in a process of its own; what is hostile is refused in one line."""

from __future__ import annotations

import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.checkpoints import pickles
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.in_memory import merged_tensors
from simmerge_ray.plans.plan import unmerged
from tests import tiny


@pytest.fixture
def pickled(tmp_path, monkeypatch):
    """A checkpoint whose weights can be written by `write(content)` as a `.bin` file."""
    monkeypatch.setenv(pickles.DIRECTORY_VARIABLE, str(tmp_path / "converted"))
    tiny.save(tiny.make_model(), tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    return CheckpointRef("p", tmp_path / "pickled")


def test_it_is_converted_once_to_the_same_tensors(pickled, tmp_path):
    model = tiny.make_model()
    tensors = model.state_dict()  # with the tied output layer, which safetensors leave out
    assert "lm_head.weight" in tensors
    torch.save(tensors, pickled.path / "pytorch_model.bin")
    found = dict(merged_tensors(unmerged(pickled)))
    wanted = load_file(tmp_path / "plain" / "model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    (made,) = (tmp_path / "converted").iterdir()
    before = {file: file.stat().st_mtime_ns for file in made.iterdir()}
    read_headers(pickled)
    assert {file: file.stat().st_mtime_ns for file in made.iterdir()} == before
    assert [path.name for path in (tmp_path / "converted").iterdir()] == [made.name]


def test_an_adapter_in_a_bin_file_is_converted_too(pickled, tmp_path):
    from simmerge_ray.checkpoints.digests import checkpoint_digest
    from tests.unit.checkpoints.test_catalogue import write_adapter

    adapter = write_adapter(tmp_path / "adapter")
    ref = CheckpointRef("a", tmp_path / "plain", adapter=adapter)
    wanted, digest = dict(merged_tensors(unmerged(ref))), checkpoint_digest(ref)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    found = dict(merged_tensors(unmerged(ref)))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items()) and checkpoint_digest(ref) == digest


class _Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/simmerge-test-was-here",)


def _huge() -> dict[str, torch.Tensor]:
    return {"weight": torch.zeros(1).expand(10**6, 10**6)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": _Bomb()}, "is no pickle of tensors alone: "),
        (_huge(), "its tensors are larger than the file at 'weight'"),
        ({"weight": torch.ones(2), "epoch": 3}, "holds 'epoch', which is no tensor"),
        ([torch.ones(2)], "holds a list, not tensors by name"),
        ({"weight": torch.ones(2).to(torch.complex64)}, "tensor 'weight' is torch.complex64"),
    ],
)
def test_what_is_no_set_of_tensors_is_refused_in_one_line(tmp_path, content, message):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message) as caught:
        pickles._tensors(tmp_path / "pytorch_model.bin", (tmp_path / "pytorch_model.bin").stat().st_size)
    assert "\n" not in str(caught.value)
    assert not os.path.exists("/tmp/simmerge-test-was-here")


def test_a_hostile_file_ends_the_process_alone_and_leaves_nothing(pickled, tmp_path):
    (pickled.path / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": _Bomb()}))
    with pytest.raises(CheckpointError, match=r"'p': its .bin files are refused: pytorch_model.bin is no pickle"):
        read_headers(pickled)
    assert not list((tmp_path / "converted").iterdir()) and not os.path.exists("/tmp/simmerge-test-was-here")
    (pickled.path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../x.bin"}}')
    with pytest.raises(CheckpointError, match=r"names '../x.bin', which is no file beside it"):
        read_headers(pickled)
