"""A member's own answers as a task without labels: an item is worth what a candidate keeps of one answer.

So a candidate that is *probed* is a trial like any other: the same evaluators (transformers by one forward pass, vLLM
by `prompt_logprobs`, nothing generated), actors, resume and label store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simmerge_ray.base.storage import digest_json
from simmerge_ray.search.evaluation.evaluator import Evaluator, TokenPair

PREFIX = "answers of "
_SCHEMA = 2  # of what the utility of an item says


@dataclass(frozen=True)
class AnswersTask:
    """Some of one checkpoint's answers.

    The utility of an item is `(kept + p) / 2`: kept is 1 where greedy decoding would give the whole answer, p the
    geometric mean of the probabilities of its tokens. `kept_and_nll` takes the two apart.

    about: whose answers to which probes; part of the name. pairs: tokens of each probe and of its answer.
    """

    about: str
    pairs: Sequence[TokenPair]

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.about}"

    @property
    def digest(self) -> str:
        """Identity of probes and answers."""
        return digest_json(["answers", _SCHEMA, [list(map(list, pair)) for pair in self.pairs]])

    @property
    def num_items(self) -> int:
        return len(self.pairs)

    @property
    def num_tokens(self) -> np.ndarray:
        """(num_items,) int64, of the answers."""
        return np.array([len(answer) for _, answer in self.pairs])

    def longest(self, tokenizer: Any) -> tuple[int, int]:
        """(tokens of the longest probe with its answer, its number from 1)."""
        del tokenizer  # they are tokens already
        lengths = [len(probe) + len(answer) for probe, answer in self.pairs]
        return max(lengths), int(np.argmax(lengths)) + 1

    def evaluate(self, evaluator: Evaluator, indices: np.ndarray | None = None) -> np.ndarray:
        """(num_items,) float64 in [0, 1]."""
        chosen = range(self.num_items) if indices is None else indices.tolist()
        found = evaluator.log_likelihoods([self.pairs[index] for index in chosen], padded=True)
        return np.array([0.5 * (one.is_greedy + np.exp(one.total / one.num_tokens)) for one in found])

    def kept_and_nll(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(num_items,) bool, and (num_items,) nats of all tokens of each answer, from the items' utilities.

        What is likelier than all else has p > 0 and what is not has p < 1, so that 1/2 parts the two. Label stores hold
        items as float32: no p is told from its smallest, about 87 nats a token.
        """
        return kept_and_nll(items, self.num_tokens)


def kept_and_nll(items: np.ndarray, num_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`AnswersTask.kept_and_nll` where the task is not at hand but the tokens of its answers are."""
    kept = np.asarray(items) > 0.5
    probability = np.clip(2.0 * np.asarray(items, dtype=np.float64) - kept, np.finfo(np.float32).tiny, 1.0)
    return kept, -np.log(probability) * num_tokens
