"""A member's own answers as a task without labels: an item is kept when a candidate gives the whole answer as well.

So a candidate that is *probed* is a trial like any other: the same evaluators (transformers by one forward pass, vLLM
by `prompt_logprobs`, nothing generated), actors, resume and label store. The utility of a kept answer is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simmerge_ray.search.evaluation.evaluator import Evaluator, TokenPair

PREFIX = "answers of "


@dataclass(frozen=True)
class AnswersTask:
    """checkpoint: whose answers they are. pairs: tokens of each probe and of its answer. digest: of both."""

    checkpoint: str
    pairs: Sequence[TokenPair]
    digest: str

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.checkpoint}"

    @property
    def num_items(self) -> int:
        return len(self.pairs)

    def longest(self, tokenizer: Any) -> tuple[int, int]:
        """(tokens of the longest probe with its answer, its number from 1)."""
        del tokenizer  # they are tokens already
        lengths = [len(probe) + len(answer) for probe, answer in self.pairs]
        return max(lengths), int(np.argmax(lengths)) + 1

    def evaluate(self, evaluator: Evaluator, indices: np.ndarray | None = None) -> np.ndarray:
        """(num_items,) float64, 1 for a kept answer."""
        chosen = range(self.num_items) if indices is None else indices.tolist()
        found = evaluator.log_likelihoods([self.pairs[index] for index in chosen])
        return np.array([float(answer.is_greedy) for answer in found])
