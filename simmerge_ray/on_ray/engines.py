"""The evaluator of a search, started where a trial runs."""

from __future__ import annotations

from typing import Any

from simmerge_ray.merging.write.tensors import MAX_THREADS
from simmerge_ray.plans.plan import unmerged
from simmerge_ray.search.evaluation import Evaluator
from simmerge_ray.search.setup import PreparedSearch


def start_evaluator(search: PreparedSearch) -> Evaluator:
    """The evaluator that the settings name; EngineError if a vLLM engine fails its check before the first label."""
    config, settings = search.config, search.settings
    threads = min(MAX_THREADS, max(1, int(config.cpus_per_trial)))  # a rank's cores merge while its GPU waits
    if settings.evaluator == "transformers":
        from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator

        device = "cuda" if config.gpus_per_trial > 0 else "cpu"
        sizes = {"max_model_len": settings.max_model_len, "merge_threads": threads}
        return TransformersEvaluator(search.template, settings.dtype, device=device, **sizes)
    from simmerge_ray.on_ray.vllm_evaluator import VllmEvaluator

    engine = VllmEvaluator(
        search.template,
        settings.dtype,
        settings.max_model_len,
        tensor_parallel_size=config.tensor_parallel,
        distributed_executor_backend=config.executor if config.tensor_parallel > 1 else None,
        gpu_memory_utilization=0.9 * config.gpus_per_trial if 0 < config.gpus_per_trial < 1 else None,
        merge_threads=threads,
    )
    engine.check_swap(unmerged(search.other), _check_prompts(search, engine.tokenizer))
    return engine


def _check_prompts(search: PreparedSearch, tokenizer: Any, count: int = 16) -> list[list[int]]:
    """Token ids on which an engine is checked: the first prompts of the first task of our own, or plain tokens."""
    from simmerge_ray.search.evaluation import Task

    for _, task in sorted(search.tasks.items()):
        if isinstance(task, Task):
            return task.encoded_prompts(task.items[:count], tokenizer)
    return [[(7 * place + number) % len(tokenizer) for place in range(1, 9)] for number in range(count)]
