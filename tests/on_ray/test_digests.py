"""Digests computed on the nodes of a cluster that runs: those of the driver, each read once."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.checkpoints import digests
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.digests import DigestEntry, checkpoint_digest
from simmerge_ray.on_ray import digests as digests_on_nodes
from simmerge_ray.on_ray import resources
from simmerge_ray.on_ray.digests import digest_on_nodes

pytestmark = pytest.mark.ray


@pytest.fixture
def moved(catalogue, tmp_path) -> Catalogue:
    """The catalogue in a place whose digests nobody knows."""
    refs = {}
    for ref in catalogue.all_refs:
        shutil.copytree(ref.path, tmp_path / ref.id)
        refs[ref.id] = replace(ref, path=tmp_path / ref.id)
    base = refs[catalogue.base.id]
    return replace(catalogue, checkpoints=tuple(refs[one.id] for one in catalogue.checkpoints), base=base)


@pytest.fixture
def read_here(monkeypatch) -> list[str]:
    """Checkpoints that this process has read."""
    found: list[str] = []

    def counted(ref):
        found.append(ref.id)
        return checkpoint_digest(ref)

    monkeypatch.setattr(digests, "checkpoint_digest", counted)
    return found


def test_the_nodes_read_what_the_driver_does_not_know(ray_cluster, moved, read_here):
    digest_on_nodes(moved)
    assert moved.digests() == {ref.id: checkpoint_digest(ref) for ref in moved.all_refs} and read_here == []


def test_what_a_node_cannot_read_is_left_to_the_driver(ray_cluster, moved, monkeypatch, read_here):
    there = digests_on_nodes._digest_there

    def failing(ref):
        if ref.id == "m1":
            raise CheckpointError("not on this node")
        return there(ref)

    monkeypatch.setattr(digests_on_nodes, "_digest_there", failing)
    digest_on_nodes(moved)
    assert [ref.id for ref in moved.all_refs if DigestEntry(ref).read() is None] == ["m1"]
    moved.digests()
    assert read_here == ["m1"]


def test_a_checkpoint_that_nobody_can_read_is_the_driver_s_error(ray_cluster, moved):
    file = moved.ref("m1").path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    digest_on_nodes(moved)
    with pytest.raises(CheckpointError, match="'m1'.* is truncated"):
        moved.digests()


def test_another_file_on_the_node_is_not_taken_for_the_driver_s(ray_cluster, moved, monkeypatch, read_here):
    monkeypatch.setattr(digests_on_nodes, "_digest_there", lambda ref: ("another", "0" * 32))
    digest_on_nodes(moved)
    moved.digests()
    assert sorted(read_here) == sorted(ref.id for ref in moved.all_refs)


def test_without_a_cluster_nothing_is_started(moved, monkeypatch):
    monkeypatch.setattr(digests_on_nodes, "on_running_cluster", lambda: False)
    digest_on_nodes(moved)
    assert all(DigestEntry(ref).read() is None for ref in moved.all_refs)


def test_a_cluster_of_one_s_own_is_none_that_runs(monkeypatch, ray_cluster):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert resources.on_running_cluster()
    monkeypatch.setattr(resources, "_own_cluster", True)
    assert not resources.on_running_cluster()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert resources.on_running_cluster()
