"""Signals on Ray: units of work spread over `SignalWorker` actors, each on its own core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from simmerge_ray.catalogue import Catalogue
from simmerge_ray.config import SignalsConfig
from simmerge_ray.distributed.resources import map_over_actors, ray_session
from simmerge_ray.probes import ProbeSet
from simmerge_ray.progress import Report
from simmerge_ray.signals.table import Executor, SignalTable, Unit, compute_signals


def ray_executor(catalogue: Catalogue, num_workers: int, report: Report | None = None) -> Executor:
    """An executor over `num_workers` actors of the current Ray cluster; a lost actor is started again."""

    def run(units: Sequence[Unit]) -> Iterator[tuple[int, Any]]:
        import ray

        from simmerge_ray.signals.worker import SignalWorker

        actor_class = ray.remote(SignalWorker).options(num_cpus=1, max_restarts=3, max_task_retries=3)
        actors = [
            actor_class.remote(catalogue.checkpoints, catalogue.base, num_threads=1)
            for _ in range(min(num_workers, len(units)))
        ]
        try:
            for done, (index, result) in enumerate(map_over_actors(actors, "run_unit", units), 1):
                if report:
                    report(done, len(units))
                yield index, result
        finally:
            for actor in actors:
                ray.kill(actor)

    return run


def compute_signals_on_ray(
    catalogue: Catalogue, probe_sets: dict[str, ProbeSet], config: SignalsConfig, report: Report | None = None
) -> SignalTable:
    """`signals.table.compute_signals` on a Ray cluster: the same table to the bit."""
    with ray_session():
        executor = ray_executor(catalogue, config.num_workers, report)
        return compute_signals(catalogue, probe_sets, config.batch_size, config.max_tokens, executor)
