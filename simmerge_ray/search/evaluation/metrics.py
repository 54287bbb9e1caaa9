"""Metrics: from what a model answers to a utility in [0, 1] per item, higher is better."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np


def exact_match(answer: str, target: str) -> float:
    """1 if the answer is the target, surrounding white space aside."""
    return float(answer.strip() == target.strip())


def contains(answer: str, target: str) -> float:
    """1 if the target occurs in the answer."""
    return float(target.strip() in answer)


def numeric(answer: str, target: str) -> float:
    """1 if the last number in the answer equals the target as a number."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", answer.replace(",", ""))
    return float(bool(numbers) and float(numbers[-1]) == float(target.replace(",", "")))


def token_probability(total: float, num_tokens: int) -> float:
    """`exp(-CE)`: geometric mean of the probabilities of the target's tokens.

    A smooth utility: it moves with every change of the weights, long before an answer flips.

    Args:
        total: log-likelihood of the target in nats. num_tokens: of the target.
    """
    return float(np.exp(min(total, 0.0) / num_tokens))


def best_choice(totals: Sequence[float], lengths: Sequence[int], right: int) -> float:
    """1 if the right choice is the most likely one, the first of equals counting.

    Args:
        totals: log-likelihood of every choice in nats. lengths: what each is divided by.
    """
    return float(int(np.argmax(np.asarray(totals) / np.asarray(lengths))) == right)


# From the text that was generated and the target.
TEXT_METRICS: Mapping[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "numeric": numeric,
}
# From the log-likelihood of choices; the number says whether it is divided by the choice's length in bytes.
CHOICE_METRICS: Mapping[str, bool] = {"multiple_choice": False, "multiple_choice_normalized": True}
# From the log-likelihood of the target: geometric and arithmetic mean of its tokens' probabilities.
CROSS_ENTROPY, MEAN_PROBABILITY = "cross_entropy", "mean_probability"
METRICS: tuple[str, ...] = (*TEXT_METRICS, *CHOICE_METRICS, CROSS_ENTROPY, MEAN_PROBABILITY)
