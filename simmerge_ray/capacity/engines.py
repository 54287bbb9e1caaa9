"""What an engine of a search asks for, how many fit, and how long a search may take: plain arithmetic, no Ray."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.capacity.placement import engine_needs, how_many_fit
from simmerge_ray.search.estimate import engine_bytes
from simmerge_ray.search.setup import PreparedSearch


def rank_needs(search: PreparedSearch, offered: Collection[str] = ()) -> dict[str, float]:
    """What one rank of an engine needs, by Ray's names. offered: names of the resources of the cluster; where its nodes
    say how large their GPUs are, one that holds the model is asked for."""
    config = search.config
    held = engine_bytes(search.template, search.settings.evaluator, search.settings.dtype)
    return engine_needs(held, config.cpus_per_trial, config.gpus_per_trial, config.tensor_parallel, offered)


def engines_that_fit(search: PreparedSearch, resources: Mapping[str, float]) -> int:
    """How many engines a cluster has room for now; at least one, which then waits for its node to come up. resources:
    CPU, GPU and memory (bytes) as Ray names them; memory counts where the engines run on CPUs."""
    whole = {kind: amount * search.config.tensor_parallel for kind, amount in rank_needs(search, resources).items()}
    room = how_many_fit(whole, resources)
    return max(1, min(room, search.config.concurrency or room))


def num_engines(search: PreparedSearch, resources: Mapping[str, float]) -> int:
    """How many engines a search starts: as many as it was told, even where there is no room for them now, since Ray
    then asks for nodes and the rest goes on without them; else as many as fit."""
    return search.config.concurrency or engines_that_fit(search, resources)


def max_seconds(config: SearchConfig, concurrency: int) -> float | None:
    """Of a search with so many engines, by its limits of hours and of GPU hours."""
    hours = [config.max_hours] if config.max_hours else []
    gpus = concurrency * config.gpus_per_trial * config.tensor_parallel
    if config.max_gpu_hours and gpus:
        hours.append(config.max_gpu_hours / gpus)
    return 3600 * min(hours) if hours else None
