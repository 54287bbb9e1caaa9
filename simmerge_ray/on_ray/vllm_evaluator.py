"""Evaluator on one live vLLM engine owned by this process, whose weights are swapped merge by merge.

No checkpoint is written and no engine is started again: a worker extension (`vllm_worker`) streams the merge, tensor by
tensor, into the engine's own weight loading, and compares what the engine then holds. Tested with vLLM 0.32 on CPU.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from simmerge_ray.base.errors import CheckpointError, ConfigError, EngineError, StorageError, unknown_name
from simmerge_ray.base.extras import require
from simmerge_ray.base.storage import RemotePath
from simmerge_ray.checkpoints.references import CheckpointRef, local_files
from simmerge_ray.plans.plan import ResolvedPlan
from simmerge_ray.search.evaluation import LogLikelihood, TokenPair, cut

# Read by vLLM when it is imported or when an engine starts.
_ENGINE_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process; only ranks may have their own
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",  # ranks end by a signal only, and hold nothing but memory
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_THREADS = "VLLM_CPU_OMP_THREADS_BIND"
_EXTENSION = "simmerge_ray.on_ray.vllm_worker.MergeExtension"  # by name: importing it imports vLLM
_START = "simmerge_start"
_EXECUTORS = ("uni", "mp", "ray")
# Largest difference of log-probabilities from transformers in float32. In bfloat16 single ones are far off in right
# engines too, so it is the mean: 0.06 on SmolLM2-135M (the largest 0.5), and 0.2 or more against its noisy copies.
_CHECK_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.15}
_CHECK_TOKENS = 8
_END_SECONDS = 10.0  # that a rank has to end by itself

Greedy = tuple[list[int], list[dict[int, float]]]

logger = logging.getLogger(__name__)


class VllmEvaluator:
    """One engine; `load` swaps the weights of a merge in, `generate` answers greedily.

    After an `EngineError` its answers cannot be trusted, so it gives none: close it and start another one. One engine
    at a time in a process: closing one takes down what vLLM shares among all.

    Args:
        template: a checkpoint of the catalogue's architecture; its weights are only the first ones held.
        max_model_len: longest prompt plus answer in tokens; a longer prompt is an error of the engine.
        tensor_parallel_size: ranks that share every layer, each a process of its own where there are several.
        distributed_executor_backend: `mp` for ranks on this node, `ray` for ranks on several; None is this process for
            one rank and `mp` for several. vLLM by itself would take `ray` inside a placement group.
        gpu_memory_utilization: share of a GPU's memory that the engine may take, so that small models can share one;
            None is vLLM's own. On CPU it has no meaning, the memory of the key-value cache is fixed.
        merge_threads: of each rank, that compute a merge while it is loaded.

    Raises:
        ConfigError: an unknown backend, fewer CPU cores than ranks, or several ranks in one process.
        EngineError: the engine did not start; none of its processes is left.
    """

    name = "vllm"

    def __init__(
        self,
        template: CheckpointRef,
        dtype: str = "float32",
        max_model_len: int = 256,
        tensor_parallel_size: int = 1,
        distributed_executor_backend: str | None = None,
        gpu_memory_utilization: float | None = None,
        merge_threads: int = 1,
    ) -> None:
        self._engine: Any = None
        self._processes: list[Any] = []
        self._files = ExitStack()  # vLLM loads the first weights itself: the one checkpoint that is copied whole
        self._broken: str | None = None
        self._dtype, self._merge_threads = dtype, merge_threads
        self.max_model_len = max_model_len
        executor = distributed_executor_backend or ("mp" if tensor_parallel_size > 1 else "uni")
        if executor not in _EXECUTORS:
            raise ConfigError(unknown_name("distributed_executor_backend", executor, _EXECUTORS))
        if tensor_parallel_size < 1 or (executor == "uni" and tensor_parallel_size > 1):
            raise ConfigError(f"tensor_parallel_size {tensor_parallel_size} does not fit the executor {executor!r}")
        for key, value in _ENGINE_ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        if executor == "ray" and isinstance(template.path, RemotePath):
            raise ConfigError(
                f"checkpoint {template.id!r} is {template.path}: an engine over several nodes (executor: ray) loads "
                "its first weights on every node itself; use executor: mp, or a filesystem that all nodes see"
            )
        options: dict[str, Any] = {
            "tensor_parallel_size": tensor_parallel_size,
            "distributed_executor_backend": executor,
        }
        options |= {"dtype": dtype, "max_model_len": max_model_len, "max_num_batched_tokens": max(8192, max_model_len)}
        with _environment(_THREADS, _thread_binding(tensor_parallel_size)):
            require("vllm", "gpu" if _has_gpu() else "cpu")
            from vllm.platforms import current_platform

            _make_llvmlite_plain()
            if gpu_memory_utilization is not None and not current_platform.is_cpu():
                options["gpu_memory_utilization"] = gpu_memory_utilization
            self._start(template, options)

    def _start(self, template: CheckpointRef, options: dict[str, Any]) -> None:
        """Start the engine, and let it learn what it can compare after a swap."""
        from vllm import LLM

        before = set(multiprocessing.active_children())
        try:
            self._engine = LLM(
                model=str(self._files.enter_context(local_files(template, weights=True))),
                enforce_eager=True,
                max_num_seqs=512,  # prompts are short and many: one step takes as many as it can, a long one in parts
                enable_prefix_caching=False,  # prompts of a task share little, and a swap would drop the cache
                disable_log_stats=True,
                worker_extension_cls=_EXTENSION,
                trust_remote_code=False,
                seed=0,
                **options,
            )
            self._processes = [child for child in multiprocessing.active_children() if child not in before]
            # The base of a LoRA checkpoint is what vLLM has loaded.
            plain = CheckpointRef(template.id, template.path)
            unknown = self._engine.collective_rpc(_START, args=(plain,))[0]
        except StorageError:
            self.close()
            raise
        except Exception as error:  # vLLM raises what it likes
            traceback.clear_frames(error.__traceback__)  # they hold the half-made engine
            self._processes = [child for child in multiprocessing.active_children() if child not in before]
            self.close()
            raise EngineError(f"the vLLM engine did not start: {error}") from error
        if unknown:
            logger.warning("the check after a swap cannot compare %s", ", ".join(unknown))
        self.tokenizer: Any = self._engine.get_tokenizer()

    def load(self, resolved: ResolvedPlan) -> None:
        """Swap the weights of a merge in, and compare what every rank then holds with what was streamed.

        Raises:
            CheckpointError: the merge is not finite; the engine is whole and takes the next one.
            EngineError: any other failure of the swap; the engine cannot be trusted, discard it.
        """
        self._check_whole()
        label = resolved.plan.label
        try:
            reports = self._engine.collective_rpc("simmerge_load", args=(resolved, self._merge_threads))
            self._engine.reset_prefix_cache()
        except Exception as error:  # vLLM raises what it likes; whatever it is, the engine cannot be trusted
            self._broken = f"swapping in {label!r} failed: {error}"
            raise EngineError(self._broken) from error
        if not_finite := [report.not_finite for report in reports if report.not_finite]:
            raise CheckpointError(not_finite[0])
        for rank, report in enumerate(reports):
            if report.differences:
                found = "; ".join(report.differences[:3]) + ("; ..." if len(report.differences) > 3 else "")
                where = f" on rank {rank}" if len(reports) > 1 else ""
                self._broken = f"the vLLM engine does not hold the weights of {label!r}{where}: {found}"
                raise EngineError(self._broken)

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Greedy answers to prompts of token ids, special tokens removed, cut before the first stop string."""
        # Stop strings are looked for in text that vLLM puts together itself; without them it need not.
        ends: dict[str, Any] = {"stop": list(stop)} if stop else {"detokenize": False}
        outputs = self._run(prompts, max_tokens=max_new_tokens, **ends)
        tokens = [output.outputs[0].token_ids for output in outputs]
        answers = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [cut(answer, stop) for answer in answers]

    def log_likelihoods(self, pairs: Sequence[TokenPair], padded: bool = False) -> list[LogLikelihood]:
        """Of the second part of each pair of token ids after the first; the engine batches as it likes."""
        del padded
        wholes = [[*before, *after] for before, after in pairs]
        outputs = self._run(wholes, max_tokens=1, detokenize=False, prompt_logprobs=0, flat_logprobs=True)
        found = []
        for (before, after), output in zip(pairs, outputs, strict=True):
            flat = output.prompt_logprobs
            places = flat.start_indices[len(before) :]  # the given token stands first at each place
            given = np.array([flat.logprobs[place] for place in places], dtype=np.float64)
            greedy = all(flat.ranks[place] == 1 for place in places)
            found.append(LogLikelihood(float(given.sum()), len(after), greedy, float(np.exp(given).mean())))
        return found

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int, num_top: int = 1) -> list[Greedy]:
        """Greedy token ids after every prompt, and at each place the log-probabilities of the `num_top` likeliest."""
        outputs = self._run(prompts, max_tokens=num_tokens, logprobs=num_top, detokenize=False)
        return [
            (list(one.token_ids), [{token: float(of.logprob) for token, of in place.items()} for place in one.logprobs])
            for one in (output.outputs[0] for output in outputs)
        ]

    def check_swap(self, resolved: ResolvedPlan, prompts: Sequence[Sequence[int]]) -> None:
        """Swap `resolved` in and compare several greedy tokens of every prompt with transformers on the same weights.

        Run once per engine before the first label: it sees what the comparison after a swap cannot, that the engine
        computes with its weights what transformers does. In float32 a token of the engine must be transformers' first
        choice, or within the tolerance of it, and have its log-probability; in bfloat16 the mean difference counts.

        Raises:
            EngineError: they differ.
        """
        import torch

        from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator

        self.load(resolved)
        num_tokens = max(1, min(_CHECK_TOKENS, self.max_model_len - max(map(len, prompts))))
        reference = TransformersEvaluator(resolved.checkpoints[0], self._dtype)
        reference.load(resolved)
        gaps = []
        for prompt, (tokens, places) in zip(prompts, self.greedy(prompts, num_tokens), strict=True):
            found = torch.tensor([place[token] for place, token in zip(places, tokens, strict=True)])
            expected = reference.log_probs([*prompt, *tokens])[len(prompt) - 1 : -1]
            given = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            gaps += [(given - found).abs(), expected.amax(dim=1) - given]
        together = torch.cat(gaps[::2] if self._dtype == "bfloat16" else gaps)
        gap = float(together.mean() if self._dtype == "bfloat16" else together.max())
        if not gap <= _CHECK_TOLERANCE[self._dtype]:
            self._broken = (
                f"the vLLM engine does not answer like the weights it was given: log-probabilities differ by "
                f"{gap:.3g} from transformers (allowed {_CHECK_TOLERANCE[self._dtype]:g}); torch {torch.__version__}"
            )
            raise EngineError(self._broken)

    def close(self) -> None:
        """End the engine: its memory is free and its processes are gone, so that another one can be started here."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
        del engine
        from vllm.model_executor.layers import rotary_embedding

        # Engines of a process share these; a swap that broke off leaves them without data.
        rotary_embedding._ROPE_DICT.clear()
        gc.unfreeze()  # a starting engine freezes all objects there are, itself among them
        gc.collect()
        _end(self._processes)
        self._processes = []
        self._files.close()

    def _run(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Any]:
        from vllm import SamplingParams

        self._check_whole()
        tokens = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return list(self._engine.generate(tokens, SamplingParams(temperature=0.0, **sampling), use_tqdm=False))

    def _check_whole(self) -> None:
        if self._broken or self._engine is None:
            raise EngineError(self._broken or "the vLLM engine is closed")


def _thread_binding(num_ranks: int) -> str:
    """Value of VLLM_CPU_OMP_THREADS_BIND: this process's cores dealt out to the ranks; one rank is left unbound, since
    several engines on one machine must not all bind to core 0."""
    if num_ranks == 1:
        return "nobind"
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < num_ranks and not _has_gpu():
        raise ConfigError(
            f"tensor_parallel_size {num_ranks} needs as many CPU cores; this process may use {len(cores)}"
        )
    parts = np.array_split(np.array(cores), num_ranks)
    return "|".join(",".join(map(str, part)) for part in parts)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@contextmanager
def _environment(key: str, value: str) -> Iterator[None]:
    """Set a variable while an engine starts, unless the user has set it."""
    given = os.environ.get(key)
    os.environ.setdefault(key, value)
    try:
        yield
    finally:
        if given is None:
            del os.environ[key]


def _end(processes: Sequence[Any]) -> None:
    """Wait for processes to end, and kill those that do not."""
    for process in processes:
        process.join(_END_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


def _make_llvmlite_plain() -> None:
    """Let an engine start beside numba: vLLM 0.32 looks at the `__dict__` of every attribute of every module, and
    llvmlite's library handle would answer that name with a function of the library."""
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None:
        ffi.lib._fntab.setdefault("__dict__", {})
