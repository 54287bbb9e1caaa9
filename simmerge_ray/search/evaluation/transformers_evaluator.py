"""Evaluator on transformers: slower than vLLM, runs wherever torch does, and is the truth vLLM is checked against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simmerge_ray.base.errors import EngineError
from simmerge_ray.checkpoints.references import CheckpointRef, context_limit
from simmerge_ray.checkpoints.tokenizers import load_tokenizer
from simmerge_ray.merging.in_memory import FiniteStream
from simmerge_ray.merging.model import load_model
from simmerge_ray.plans.plan import ResolvedPlan
from simmerge_ray.search.evaluation.evaluator import LogLikelihood, TokenPair, cut

_LOGIT_BYTES = 1 << 28  # of float32 logits held at once
_CPU_TOKENS = 768  # of a padded batch on a CPU: more leave its caches, and gain nothing for any size of model


class TransformersEvaluator:
    """Holds one model built from `template`, whose weights `load` replaces in place.

    Args:
        device: `cpu` or `cuda`. batch_size: sequences at once. merge_threads: that compute a merge.
    """

    name = "transformers"

    def __init__(
        self,
        template: CheckpointRef,
        dtype: str = "float32",
        batch_size: int = 256,
        device: str = "cpu",
        max_model_len: int | None = None,
        merge_threads: int = 1,
    ) -> None:
        self._model: Any = load_model(template, getattr(torch, dtype)).to(device)
        self._device, self._batch_size, self._merge_threads = device, batch_size, merge_threads
        self.tokenizer: Any = load_tokenizer(template, padding_side="left")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.max_model_len = max_model_len or context_limit(template) or 4096

    def load(self, resolved: ResolvedPlan) -> None:
        """Replace the weights by those of the merge.

        Raises:
            CheckpointError: the merge is not finite.
            EngineError: the merge does not have exactly this model's parameters.
        """
        stream = FiniteStream(resolved, self._merge_threads)
        result = self._model.load_state_dict(dict(stream), strict=False)
        stream.check()
        tied = {"lm_head.weight"} if self._model.config.tie_word_embeddings else set()
        if result.unexpected_keys or set(result.missing_keys) - tied:
            raise EngineError(
                f"weights do not fit: missing {result.missing_keys[:3]}, unexpected {result.unexpected_keys[:3]}"
            )

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Greedy answers to prompts of token ids, special tokens removed, cut before the first stop string."""
        answers = [""] * len(prompts)
        for indices in _equal_lengths(prompts, self._batch_size):
            input_ids = torch.tensor([list(prompts[index]) for index in indices], device=self._device)
            output = self._model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            texts = self.tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(indices, texts, strict=True):
                answers[index] = cut(text, stop)
        return answers

    @torch.no_grad()
    def log_likelihoods(self, pairs: Sequence[TokenPair], padded: bool = False) -> list[LogLikelihood]:
        """Of the second part of each pair of token ids after the first."""
        found: dict[int, LogLikelihood] = {}
        wholes = [[*before, *after] for before, after in pairs]
        vocabulary = int(self._model.config.vocab_size)
        longest = max((len(whole) for whole in wholes), default=1)
        batch_size = max(1, min(self._batch_size, _LOGIT_BYTES // (4 * vocabulary * longest)))
        if padded and self._device == "cpu":
            batch_size = max(1, min(batch_size, _CPU_TOKENS // longest))
        batches = _similar_lengths if padded else _equal_lengths
        for indices in batches(wholes, batch_size):
            # Answers end together, so that the head is run over as many last positions as the longest one has.
            width, last = max(len(wholes[i]) for i in indices), max(len(pairs[i][1]) for i in indices)
            rows = [[0] * (width - len(wholes[i])) + wholes[i] for i in indices]
            input_ids = torch.tensor(rows, device=self._device)
            mask = torch.tensor([[0] * (width - len(wholes[i])) + [1] * len(wholes[i]) for i in indices])
            logits = self._last_logits(input_ids, mask.to(self._device), last + 1, padded)
            log_probs = torch.log_softmax(logits.float(), dim=-1)[:, :-1]
            answers = input_ids[:, width - last :]
            given = log_probs.gather(2, answers[:, :, None])[:, :, 0].double().cpu().numpy()
            greedy = (log_probs.argmax(dim=-1) == answers).cpu().numpy()
            for row, index in enumerate(indices):
                length = len(pairs[index][1])
                own = given[row, last - length :]  # sums over these alone: the same bits beside any other rows
                is_greedy = bool(greedy[row, last - length :].all())
                found[index] = LogLikelihood(float(own.sum()), length, is_greedy, float(np.exp(own).mean()))
        return [found[index] for index in range(len(pairs))]

    def _last_logits(self, input_ids: Tensor, mask: Tensor, count: int, padded: bool) -> Tensor:
        """(B, count, V): logits at the last positions of left-padded rows."""
        if not padded:  # the bits of `log_probs`
            return self._model(input_ids=input_ids).logits[:, -count:]
        places = (mask.cumsum(1) - 1).clamp_min(0)
        given = {"attention_mask": mask, "position_ids": places, "logits_to_keep": count, "use_cache": False}
        return self._model(input_ids=input_ids, **given).logits

    @torch.no_grad()
    def log_probs(self, ids: Sequence[int]) -> Tensor:
        """Log-probabilities (T, vocabulary) float32 of what follows each of a sequence of token ids (T,)."""
        input_ids = torch.tensor([list(ids)], device=self._device)
        return torch.log_softmax(self._model(input_ids=input_ids).logits[0].float(), dim=-1).cpu()


def _equal_lengths(sequences: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of sequences of one length, at most `batch_size` at once: so nothing is padded, and padding would change
    float32 sums, and with them now and then an answer."""
    by_length: dict[int, list[int]] = {}
    for index, sequence in enumerate(sequences):
        by_length.setdefault(len(sequence), []).append(index)
    for _, indices in sorted(by_length.items()):
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]


def _similar_lengths(sequences: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices in order of length, cut where more than a third of a batch would be padding."""
    batch: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda one: len(sequences[one])):
        if batch and (len(batch) == batch_size or len(sequences[index]) > 1.5 * len(sequences[batch[0]])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
