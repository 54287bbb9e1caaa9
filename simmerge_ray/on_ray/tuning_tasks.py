"""Tunings on a Ray cluster: several at a time, each on a core or share of a GPU of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing

from simmerge_ray.capacity.placement import signal_worker_needs
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.size import num_elements
from simmerge_ray.on_ray.resources import check_room, ray_session
from simmerge_ray.on_ray.signal_actors import spread_options
from simmerge_ray.on_ray.tasks import run_tasks
from simmerge_ray.search.estimate import PROCESS_BYTES
from simmerge_ray.signals.tuning.grams import GramJob, write_grams
from simmerge_ray.signals.tuning.run import TunedRecipe, TuningJob, run_tuning


def run_tunings(
    jobs: Sequence[TuningJob],
    gpus: float = 0.0,
    max_running: int | None = None,
    report: Callable[[int, TunedRecipe], None] | None = None,
) -> list[TunedRecipe]:
    """`run_tuning` of every job, in their order, as many at once as the cluster has room for.

    A task that is lost is run again and goes on from its state file, which must lie on a disk that the nodes share.

    Args:
        gpus: share of a GPU for each; 0 runs on the CPU, one core each.
        max_running: no more at a time.
        report: called with a job's number and its result as it ends.

    Raises:
        ConfigError: no node has room for one. What `run_tuning` raises.
    """
    found: dict[int, TunedRecipe] = {}
    with ray_session():
        import ray

        held = max(job.num_bytes for job in jobs) + (0 if gpus else PROCESS_BYTES["transformers"])
        needs = signal_worker_needs(held, gpus, ray.cluster_resources())
        check_room(needs, "a tuning")
        calls = deque((number, job, "cuda" if gpus else "cpu") for number, job in enumerate(jobs))
        with closing(run_tasks(_numbered, calls, max_running=max_running, **spread_options(needs))) as results:
            for (number, *_), tuned in results:
                found[number] = tuned
                if report:
                    report(number, tuned)
    return [found[number] for number in range(len(jobs))]


def write_grams_on_ray(jobs: Sequence[GramJob], gpus: float = 0.0, max_running: int | None = None) -> None:
    """`write_grams` of every job, as many at once as the cluster has room for; the store is one that nodes share.

    Raises:
        ConfigError: no node has room for one. What `write_grams` raises.
    """
    with ray_session():
        import ray

        # Beside the model, float64 sums and what is written weigh about three times the linear layers.
        held = 16 * num_elements(read_headers(jobs[0].ref)) + (0 if gpus else PROCESS_BYTES["transformers"])
        needs = signal_worker_needs(held, gpus, ray.cluster_resources())
        check_room(needs, "Gram matrices")
        calls = deque((job, "cuda" if gpus else "cpu") for job in jobs)
        with closing(run_tasks(_gram_task, calls, max_running=max_running, **spread_options(needs))) as results:
            for _ in results:
                pass


def _gram_task(job: GramJob, device: str) -> None:
    import torch

    torch.set_num_threads(1)
    write_grams(job, device)


def _numbered(_: int, job: TuningJob, device: str) -> TunedRecipe:
    """One job on a worker; one thread of its own, so that several do not fight for cores."""
    import torch

    torch.set_num_threads(1)
    return run_tuning(job, device)
