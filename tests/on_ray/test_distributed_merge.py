"""A merge split over Ray tasks has the bytes of a local one, also when a task is lost."""

from __future__ import annotations

import os
import signal

import pytest

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.write.directory import write_graph, write_merge
from simmerge_ray.merging.write.layout import plan_layout
from simmerge_ray.merging.write.output import WriteOptions
from simmerge_ray.on_ray import merge_tasks as distributed_merge
from simmerge_ray.on_ray.merge_tasks import RayRunner, split_by_bytes
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import pair_plan, resolve_plan


@pytest.fixture
def graph(catalogue):
    return compile_plan(resolve_plan(pair_plan("m0", "m1", make_arm("ties")), catalogue))


def test_shares_hold_every_tensor_once_and_are_balanced(graph):
    placements = plan_layout(graph.outputs).placements
    for count in (1, 2, 3, 100):
        shares = split_by_bytes(placements, count)
        assert sorted(p.output.name for share in shares for p in share) == sorted(p.output.name for p in placements)
        sizes = [sum(p.output.num_bytes for p in share) for share in shares]
        assert min(sizes) > 0 and max(sizes) - min(sizes) <= max(p.output.num_bytes for p in placements)


def dying_share(graph, partial, share, journal, num_threads):
    """Dies once, after its first tensor, if it is one of two shares."""
    mark = partial.parent / f"died.{journal}"
    if journal.endswith((".0", ".5")) and not mark.exists():
        mark.touch()
        distributed_merge.write_tensors(graph, partial, share[:1], journal, num_threads=1)
        os.kill(os.getpid(), signal.SIGKILL)
    distributed_merge.make_share(graph, partial, share, journal, num_threads)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_tasks_write_the_bytes_of_a_local_merge_also_after_a_task_is_lost(graph, catalogue, tmp_path, monkeypatch):
    local = write_merge(resolve_plan(pair_plan("m0", "m1", make_arm("ties")), catalogue), tmp_path / "local").path
    seen: list[tuple[int, int]] = []
    result = write_graph(
        graph, tmp_path / "tasks", WriteOptions(progress=lambda *x: seen.append(x), runner=RayRunner(2))
    )
    assert (result.path / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()
    assert seen[-1] == (result.num_bytes, result.num_bytes)
    monkeypatch.setattr(distributed_merge, "make_share", dying_share)
    result = write_graph(graph, tmp_path / "lost", WriteOptions(runner=RayRunner(2)))
    assert len(list(tmp_path.glob("died.*"))) == 2
    assert (result.path / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_an_error_in_a_task_keeps_its_type_and_nothing_is_left(graph, tmp_path, monkeypatch):
    def failing(*_):
        raise CheckpointError("disk gone")

    monkeypatch.setattr(distributed_merge, "make_share", failing)
    with pytest.raises(CheckpointError, match="disk gone"):
        write_graph(graph, tmp_path / "out", WriteOptions(runner=RayRunner(2)))
    assert list(tmp_path.iterdir()) == []
