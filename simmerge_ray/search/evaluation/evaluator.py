"""The interface of what runs a model, and of what a search evaluates with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from simmerge_ray.plans.plan import ResolvedPlan

TokenPair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class LogLikelihood:
    """Of an answer after its context: sum over its tokens in nats, how many they are, whether greedy decoding would
    have given them, and the mean of their probabilities."""

    total: float
    num_tokens: int
    is_greedy: bool
    mean_probability: float


class Evaluator(Protocol):
    """Holds one model of the catalogue's architecture and answers prompts with it. Same weights, same answers.

    `name` is written into every label. `load` puts the weights of a plan into it, and raises `EngineError` when it
    cannot vouch for what it then holds, `CheckpointError` when the merge cannot be measured but the evaluator is whole.
    """

    name: str
    tokenizer: Any
    max_model_len: int

    def load(self, resolved: ResolvedPlan) -> None: ...

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Greedy answers to prompts of token ids, special tokens removed, cut before the first stop string."""
        ...

    def log_likelihoods(self, pairs: Sequence[TokenPair], padded: bool = False) -> list[LogLikelihood]:
        """Of the second part of each pair of token ids after the first.

        padded: pairs of different lengths may be run together, which is faster and changes float32 sums by rounding.
        """
        ...


class EvaluationTask(Protocol):
    """What a search evaluates: a `Task` of our own, or one of lm-evaluation-harness."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str:
        """Identity of everything that a utility depends on besides the model."""
        ...

    @property
    def num_items(self) -> int: ...

    def longest(self, tokenizer: Any) -> tuple[int, int]:
        """(tokens that an evaluator must hold, number of the item from 1) of the task's longest item."""
        ...

    def evaluate(self, evaluator: Evaluator, indices: np.ndarray | None = None) -> np.ndarray:
        """Per-item utilities float64 in [0, 1] of the loaded weights, of all items or of those at `indices`."""
        ...


def cut(answer: str, stop: Sequence[str]) -> str:
    """The answer up to the first stop string in it."""
    ends = [place for text in stop if (place := answer.find(text)) >= 0]
    return answer[: min(ends)] if ends else answer
