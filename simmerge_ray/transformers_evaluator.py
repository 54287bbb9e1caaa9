"""Evaluator on transformers: slower than vLLM, runs wherever torch does, and is the truth vLLM is checked against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from simmerge_ray.checkpoints import CheckpointRef
from simmerge_ray.errors import EngineError
from simmerge_ray.merging import FiniteStream
from simmerge_ray.plans import ResolvedPlan
from simmerge_ray.signals.collect import load_model


class TransformersEvaluator:
    """Holds one model built from `template`, whose weights `load` replaces in place."""

    name = "transformers"

    def __init__(self, template: CheckpointRef, dtype: str = "float32", batch_size: int = 256) -> None:
        from transformers import AutoTokenizer

        self._model: Any = load_model(template, getattr(torch, dtype))
        self._tokenizer: Any = AutoTokenizer.from_pretrained(template.path, local_files_only=True, padding_side="left")
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._batch_size = batch_size

    def load(self, resolved: ResolvedPlan) -> None:
        """Replace the weights by those of the merge.

        Raises:
            CheckpointError: the merge is not finite.
            EngineError: the merge does not have exactly this model's parameters.
        """
        stream = FiniteStream(resolved)
        result = self._model.load_state_dict(dict(stream), strict=False)
        stream.check()
        tied = {name for name in result.missing_keys if self._is_tied(name)}
        if result.unexpected_keys or set(result.missing_keys) - tied:
            raise EngineError(
                f"weights do not fit: missing {result.missing_keys[:3]}, unexpected {result.unexpected_keys[:3]}"
            )

    def _is_tied(self, name: str) -> bool:
        return name == "lm_head.weight" and bool(self._model.config.tie_word_embeddings)

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers, special tokens removed. Prompts of one length share a batch, so that nothing is padded:
        padding changes float32 sums, and with them now and then an answer."""
        answers = [""] * len(prompts)
        encoded = [self._tokenizer(prompt)["input_ids"] for prompt in prompts]
        by_length: dict[int, list[int]] = {}
        for index, ids in enumerate(encoded):
            by_length.setdefault(len(ids), []).append(index)
        for _, indices in sorted(by_length.items()):
            for start in range(0, len(indices), self._batch_size):
                chosen = indices[start : start + self._batch_size]
                input_ids = torch.tensor([encoded[index] for index in chosen])
                output = self._model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=self._tokenizer.pad_token_id,
                )
                texts = self._tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
                for index, text in zip(chosen, texts, strict=True):
                    answers[index] = text
        return answers

    @torch.no_grad()
    def next_token_log_probs(self, prompt: str) -> torch.Tensor:
        """Log-probabilities (vocabulary,) float32 of the token after a prompt."""
        input_ids = torch.tensor([self._tokenizer(prompt)["input_ids"]])
        return torch.log_softmax(self._model(input_ids=input_ids).logits[0, -1].float(), dim=-1)
