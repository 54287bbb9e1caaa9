"""What an engine of a search asks for, how many fit, and how long a search may take: plain arithmetic, no Ray."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.progress import duration
from simmerge_ray.capacity.placement import engine_needs, how_many_fit
from simmerge_ray.capacity.simulation.costs import load_costs
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.size import COMPUTE_BYTES, num_elements
from simmerge_ray.checkpoints.tokenizers import load_tokenizer
from simmerge_ray.search.estimate import engine_bytes
from simmerge_ray.search.evaluation import Task
from simmerge_ray.search.setup import PreparedSearch

_BATCH_SIZE = 256  # of the transformers evaluator
_READ_BYTES_PER_S = 5.3e9  # weights that a core reads for a token: 134.5 M parameters in float32 in 0.101 s


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


def waiting_lines(search: PreparedSearch) -> list[str]:
    """What a person is told before the transformers evaluator runs on CPUs, which takes long; else nothing."""
    config = search.config
    if config.evaluator != "transformers" or config.gpus_per_trial:
        return []
    items = sum(task.num_items for task in search.tasks.values())
    seconds = duration(max(1.0, trial_seconds(search)))
    return [
        f"a trial takes at most about {seconds} by transformers: {items} items on {config.cpus_per_trial:g} core(s); "
        "vLLM (--evaluator vllm, where it is installed) was 11 times as fast with a model of 135 M"
    ]


def trial_seconds(search: PreparedSearch) -> float:
    """What transformers takes at most for all items of a search on the cores of one engine: arithmetic of every token,
    and for each token of an answer a reading of all weights, by batches of prompts of one length."""
    parameters = num_elements(read_headers(search.template))
    tokenizer = load_tokenizer(search.template)
    tokens = steps = 0
    for task in search.tasks.values():
        if isinstance(task, Task) and task.generates:
            lengths = Counter(len(ids) for ids in task.encoded_prompts(task.items, tokenizer))
            tokens += sum(length * count for length, count in lengths.items()) + task.max_new_tokens * task.num_items
            steps += task.max_new_tokens * sum(math.ceil(count / _BATCH_SIZE) for count in lengths.values())
        else:
            tokens += task.longest(tokenizer)[0] * task.num_items
    cores = max(1.0, search.config.cpus_per_trial)
    weights = parameters * COMPUTE_BYTES[search.settings.dtype]
    return 2 * parameters * tokens / (cores * load_costs().of("core_flops")) + steps * weights / _READ_BYTES_PER_S
