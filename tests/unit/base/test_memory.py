"""Free memory: of the machine, or what is left of a container's limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from simmerge_ray.base.memory import free_memory, total_memory
from simmerge_ray.on_ray import resources

V2 = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 600\ninactive_file 50\n"}
V1 = {"limit_in_bytes": "1000\n", "usage_in_bytes": "700\n", "stat": "inactive_file 1\ntotal_inactive_file 50\n"}


@pytest.mark.parametrize("files", [V2, {f"memory/memory.{name}": text for name, text in V1.items()}], ids=["v2", "v1"])
def test_a_container_has_what_is_left_of_its_limit(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert (total_memory(tmp_path), free_memory(tmp_path)) == (1000, 350)


def test_a_machine_without_a_limit_has_what_the_kernel_says(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert 0 < free_memory(tmp_path) <= total_memory(tmp_path) == total_memory(Path("/nowhere"))


def test_a_cluster_of_this_process_offers_what_is_free_and_at_most_its_share(monkeypatch):
    monkeypatch.setattr(resources, "total_memory", lambda: 100)
    for free, offered in ((10, 9), (99, 70)):
        monkeypatch.setattr(resources, "free_memory", lambda free=free: free)
        assert resources.memory_for_workers() == offered
