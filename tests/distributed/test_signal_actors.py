"""Signals on Ray actors: the same bits as in one process, whatever the number of workers, and after a crash."""

from __future__ import annotations

import os
import signal

import pytest

from simmerge_ray.config import SignalsConfig
from simmerge_ray.distributed.resources import map_over_actors
from simmerge_ray.distributed.signal_actors import compute_signals_on_ray
from simmerge_ray.errors import CheckpointError
from simmerge_ray.probes import load_probe_sets
from simmerge_ray.signals.table import compute_signals

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_the_table_has_the_same_bits_as_in_one_process(catalogue, catalogue_path):
    import torch

    probe_sets = load_probe_sets(catalogue_path.parent / "probes")
    seen: list[tuple[int, int]] = []
    config = SignalsConfig(num_workers=2, batch_size=8)
    table = compute_signals_on_ray(catalogue, probe_sets, config, lambda *x: seen.append(x))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the actors: float32 sums depend on the number of threads
    try:
        local = compute_signals(catalogue, probe_sets, batch_size=8)
    finally:
        torch.set_num_threads(threads)
    assert table == local
    assert seen[-1][0] == seen[-1][1] == len(seen)


class Square:
    """Squares numbers; dies by its own hand at the first 3, and raises at a negative one."""

    def __init__(self, marker: str) -> None:
        self._marker = marker

    def run(self, number: int) -> int:
        if number < 0:
            raise CheckpointError("negative")
        if number == 3 and not os.path.exists(self._marker):
            open(self._marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number


def test_a_killed_actor_is_restarted_and_no_result_is_missing_or_double(tmp_path):
    import ray

    actor = ray.remote(Square).options(num_cpus=1, max_restarts=2, max_task_retries=2)
    actors = [actor.remote(str(tmp_path / "died")) for _ in range(2)]
    results = list(map_over_actors(actors, "run", [(n,) for n in range(8)]))
    assert sorted(results) == [(n, n * n) for n in range(8)]
    assert (tmp_path / "died").exists()


def test_an_error_in_an_actor_keeps_its_type_and_message(tmp_path):
    import ray

    actors = [ray.remote(Square).options(num_cpus=1).remote("")]
    with pytest.raises(CheckpointError, match="negative"):
        list(map_over_actors(actors, "run", [(-1,)]))
