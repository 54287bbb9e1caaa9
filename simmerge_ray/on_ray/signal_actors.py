"""Signals on Ray: units of work spread over `SignalWorker` actors, each on its own core or share of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from simmerge_ray.base.config import SignalsConfig
from simmerge_ray.base.progress import Report
from simmerge_ray.base.storage import Place
from simmerge_ray.capacity.placement import Needs, signal_worker_needs
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.probes import ProbeSet
from simmerge_ray.on_ray.actor_pool import ActorPool
from simmerge_ray.on_ray.resources import check_room, ray_session
from simmerge_ray.search.estimate import PROCESS_BYTES
from simmerge_ray.signals.bounds import held_bytes
from simmerge_ray.signals.compute import compute_signals, signals_into
from simmerge_ray.signals.queue import Executor, WorkQueue
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore
from simmerge_ray.signals.table import SignalTable
from simmerge_ray.signals.tokens import tokenize_probes


@contextmanager
def ray_executor(
    catalogue: Catalogue,
    num_workers: int,
    gpus_per_worker: float = 0.0,
    report: Report | None = None,
    worker_bytes: float = 0.0,
) -> Iterator[Executor]:
    """An executor over actors of the current Ray cluster, for a block; ConfigError if a local one has no room for one.

    Another actor repeats the units of a lost one; they are functions of the files, so the numbers are the same. Actors
    read whole checkpoints: they are spread over the nodes, to share disks and networks, and ask for the memory that
    they hold.

    Args:
        gpus_per_worker: share of a GPU for each actor; 0 runs on the CPU, one core each.
        worker_bytes: memory of an actor, on the GPU where it has a share of one.
    """
    import ray

    from simmerge_ray.signals.worker import SignalWorker

    device = "cuda" if gpus_per_worker > 0 else "cpu"
    needs = signal_worker_needs(worker_bytes, gpus_per_worker, ray.cluster_resources())
    check_room(needs, "a signal worker (memory_per_worker runs a checkpoint in parts)")
    actor_class = ray.remote(SignalWorker).options(**spread_options(needs))

    def spawn() -> Any:
        return actor_class.remote(catalogue.all_refs, catalogue.base, num_threads=1, device=device)

    with ActorPool(spawn, worker_bytes=worker_bytes) as pool:

        def run(queue: WorkQueue) -> Iterator[tuple[int, Any]]:
            # Actors are started when there is work: a run that finds all signatures in place starts none.
            num_actors = min(num_workers, len(queue))
            for done, (index, result) in enumerate(pool.drain("run_unit", queue.take, num_actors), 1):
                if report:
                    report(done, len(queue))
                yield index, result

        yield run


def compute_signals_on_ray(
    catalogue: Catalogue,
    probe_sets: dict[str, ProbeSet],
    config: SignalsConfig,
    report: Report | None = None,
    store: SignatureStore | None = None,
    out: Place | None = None,
    then: Callable[[Executor], None] | None = None,
) -> SignalTable:
    """`signals.compute.compute_signals` on a Ray cluster: the same table to the bit.

    Args:
        out: with a store, where the table is written (`signals.compute.signals_into`). then: called with the same
            actors before they end.
    """
    spec = SignatureSpec.of(config)
    tokenize_probes(catalogue, probe_sets, spec)  # a probe that does not fit, before Ray is started
    held = held_bytes(catalogue.checkpoints[0], spec, config.memory_per_worker)
    worker_bytes = held + (0 if config.gpus_per_worker else PROCESS_BYTES["transformers"])
    actors = config.num_workers, config.gpus_per_worker
    with ray_session(), ray_executor(catalogue, *actors, report, worker_bytes) as executor:
        memory = config.memory_per_worker
        made_with = catalogue, probe_sets, spec, config.weights
        if out is not None and store is not None:
            table = signals_into(out, *made_with, store, executor, memory)
        else:
            table = compute_signals(*made_with, store, executor, memory_per_worker=memory)
        if then is not None:
            then(executor)
        return table


def spread_options(needs: Needs) -> dict[str, Any]:
    """Options of Ray actors with these needs, spread over the nodes."""
    named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    options: dict[str, Any] = {named[kind]: amount for kind, amount in needs.items() if kind in named}
    custom = {kind: amount for kind, amount in needs.items() if kind not in named}
    return options | {"resources": custom, "scheduling_strategy": "SPREAD"}
