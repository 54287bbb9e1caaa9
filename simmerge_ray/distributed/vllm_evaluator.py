"""Evaluator on one live vLLM engine in this process, whose weights are swapped merge by merge.

No checkpoint is written and no engine is started again: a worker extension streams the merge, tensor by tensor, into
the engine's own weight loading. Tested with vLLM 0.32 on CPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from simmerge_ray.checkpoints import CheckpointRef
from simmerge_ray.errors import CheckpointError, EngineError
from simmerge_ray.evaluation import LogLikelihood, TokenPair, cut
from simmerge_ray.plans import ResolvedPlan

# Read by vLLM when it is imported or when an engine starts.
_ENGINE_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines on one machine must not all bind to core 0
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_CHECK_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15}


class MergeExtension:
    """Mixed into vLLM's worker class (`worker_extension_cls`): every rank streams and shards the merge for itself."""

    def simmerge_load(self, resolved: ResolvedPlan) -> None:
        """Replace the weights by the merge."""
        from simmerge_ray.merging import FiniteStream

        stream = FiniteStream(resolved)
        self.reload_weights(weights_iterator=iter(stream))  # type: ignore[attr-defined]
        # On CPU in float32 every matrix is packed into a closure at load time. A tied lm_head owns no tensor, so a
        # reload leaves its old pack in place and the engine silently answers with the old output layer.
        head = getattr(self.model_runner.get_model(), "lm_head", None)  # type: ignore[attr-defined]
        if head is not None and hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)
        stream.check()


class VllmEvaluator:
    """One engine; `load` swaps the weights of a merge in, `generate` answers greedily.

    Args:
        template: a checkpoint of the catalogue's architecture; its weights are only the first ones held.
        max_model_len: longest prompt plus answer in tokens; a longer prompt is an error of the engine.
    """

    name = "vllm"

    def __init__(self, template: CheckpointRef, dtype: str = "float32", max_model_len: int = 256) -> None:
        for key, value in _ENGINE_ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        from vllm import LLM

        _make_llvmlite_plain()
        self._dtype = dtype
        self.max_model_len = max_model_len
        self._engine: Any = LLM(
            model=str(template.path),
            dtype=dtype,
            enforce_eager=True,
            max_model_len=max_model_len,
            max_num_seqs=512,
            max_num_batched_tokens=max(8192, max_model_len),
            enable_prefix_caching=False,  # prompts of a task share little, and a swap would have to drop the cache
            disable_log_stats=True,
            worker_extension_cls=f"{MergeExtension.__module__}.{MergeExtension.__qualname__}",
            trust_remote_code=False,
            seed=0,
        )
        self.tokenizer: Any = self._engine.get_tokenizer()

    def load(self, resolved: ResolvedPlan) -> None:
        """Swap the weights of a merge in.

        Raises:
            CheckpointError: the merge is not finite; the engine is whole and takes the next one.
            EngineError: any other failure of the swap; the engine is half-loaded, discard it.
        """
        try:
            self._engine.collective_rpc("simmerge_load", args=(resolved,))
            self._engine.reset_prefix_cache()
        except CheckpointError:
            raise
        except Exception as error:  # vLLM raises what it likes; whatever it is, the engine cannot be trusted
            raise EngineError(f"swapping in {resolved.plan.label!r} failed: {error}") from error

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Greedy answers to prompts of token ids, special tokens removed, cut before the first stop string."""
        # Stop strings are looked for in text that vLLM puts together itself; without them it need not.
        ends: dict[str, Any] = {"stop": list(stop)} if stop else {"detokenize": False}
        outputs = self._run(prompts, max_tokens=max_new_tokens, **ends)
        tokens = [output.outputs[0].token_ids for output in outputs]
        answers = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [cut(answer, stop) for answer in answers]

    def log_likelihoods(self, pairs: Sequence[TokenPair]) -> list[LogLikelihood]:
        """Of the second part of each pair of token ids after the first."""
        wholes = [[*before, *after] for before, after in pairs]
        outputs = self._run(wholes, max_tokens=1, detokenize=False, prompt_logprobs=0)
        found = []
        for (before, after), output in zip(pairs, outputs, strict=True):
            places = output.prompt_logprobs[len(before) :]
            entries = [place[token] for place, token in zip(places, after, strict=True)]
            total = float(np.sum([entry.logprob for entry in entries], dtype=np.float64))
            found.append(LogLikelihood(total, len(after), all(entry.rank == 1 for entry in entries)))
        return found

    def check_swap(self, resolved: ResolvedPlan, prompts: Sequence[Sequence[int]]) -> None:
        """Swap `resolved` in and compare next-token log-probabilities with transformers on the same weights.

        Run once per engine before the first label: an engine that keeps an old tensor raises nothing by itself.

        Raises:
            EngineError: the engine's log-probability of its first choice differs from transformers'.
        """
        import torch

        from simmerge_ray.transformers_evaluator import TransformersEvaluator

        self.load(resolved)
        outputs = self._run(prompts, max_tokens=1, logprobs=1)
        reference = TransformersEvaluator(resolved.checkpoints[0], self._dtype)
        reference.load(resolved)
        differences = []
        for prompt, output in zip(prompts, outputs, strict=True):
            token = output.outputs[0].token_ids[0]
            expected = reference.next_token_log_probs(prompt)[token]
            differences.append(abs(float(expected) - output.outputs[0].logprobs[0][token].logprob))
        worst = float(np.max(differences))
        if not worst <= _CHECK_TOLERANCE[self._dtype]:
            raise EngineError(
                f"the vLLM engine does not hold the weights it was given: log-probabilities differ by {worst:.3g} "
                f"from transformers (allowed {_CHECK_TOLERANCE[self._dtype]:g}); torch {torch.__version__}"
            )

    def close(self) -> None:
        """Drop the engine and its memory, so that another one can be started in this process."""
        import gc

        from vllm.model_executor.layers import rotary_embedding

        # Engines of a process share these; a swap that broke off leaves them without data.
        rotary_embedding._ROPE_DICT.clear()
        self._engine = None
        gc.collect()

    def _run(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Any]:
        from vllm import SamplingParams

        tokens = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return list(self._engine.generate(tokens, SamplingParams(temperature=0.0, **sampling), use_tqdm=False))


def _make_llvmlite_plain() -> None:
    """Let an engine start in a process where the merge engine has loaded numba.

    vLLM 0.32 looks at the `__dict__` of every attribute of every module. llvmlite's library handle has none but answers
    any name with a function of the library, and the engine would fail on that function.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None:
        ffi.lib._fntab.setdefault("__dict__", {})
