"""Owners with made-up answers, what checkpoints think of them, and an evaluator that makes up what merges do."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.checkpoints.probes import TokenBatch
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.search.evaluation.evaluator import LogLikelihood
from simmerge_ray.selector.finding.aim import Aim
from simmerge_ray.selector.finding.virtual import VirtualScorer
from simmerge_ray.signals.candidates.answers import Answers, join_answers
from simmerge_ray.signals.candidates.signatures import OwnAnswers, Owner
from simmerge_ray.signals.candidates.virtual import KeptAnswers

PROMPT_TOKENS = (2, 3, 4, 5)


def answers_to(task: str, num_probes: int, seed: int, batch_size: int = 8) -> Answers:
    """Answers of 1 to 4 tokens to probes of several lengths."""
    generator = np.random.default_rng(seed)
    batches, written = [], []
    for start in range(0, num_probes, batch_size):
        lengths = [PROMPT_TOKENS[n % 4] for n in range(start, min(start + batch_size, num_probes))]
        mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
        ids = torch.from_numpy(generator.integers(2, 50, mask.shape)) * mask
        batches.append(TokenBatch(ids, mask))
        written.append([generator.integers(2, 50, generator.integers(1, 5)).tolist() for _ in lengths])
    return join_answers(batches, written, task)


def own_answers(
    ids: Sequence[str], owner: Owner, num_probes: int = 24, seed: int = 0, num_kept: int = 6, spread: float = 2.0
) -> OwnAnswers:
    """Answers of a member of `ids`, or of the base, with random log-probabilities of everybody at them."""
    answers = answers_to(owner.task, num_probes, seed)
    generator = np.random.default_rng(1000 + seed)
    base = generator.normal(size=(answers.tokens.size, num_kept + 1)) * spread
    logits = np.stack([base, *(base + generator.normal(size=base.shape) * spread for _ in ids)])
    place = 0 if owner.checkpoint not in ids else 1 + list(ids).index(owner.checkpoint)
    logits[place, :, 0] = logits[place].max(1) + 0.5  # its own answers
    likely = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
    return OwnAnswers(
        owner,
        answers,
        KeptAnswers(
            tuple(ids), likely[1:, :, :-1], likely[1:, :, -1], likely[0, :, :-1], likely[0, :, -1], owner.checkpoint,
            answers.answer,
        ),
        np.broadcast_to(np.arange(num_kept), likely.shape[1:2] + (num_kept,)),
        "",
    )  # fmt: skip


class WeightsOnly:
    """Coefficients of recipes: their weights by name, whatever the operator."""

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = list(ids)

    def of(self, plan: MergePlan) -> np.ndarray:
        assert plan.recipe is not None
        by_name = dict(zip(plan.recipe.members, plan.recipe.weights, strict=True))
        return np.array([float(by_name.get(name, 0.0)) for name in self._ids])


def scorer_of(ids: Sequence[str], answers: Sequence[OwnAnswers], aim: Aim) -> VirtualScorer:
    return VirtualScorer(ids, answers, WeightsOnly(ids), aim)  # type: ignore[arg-type]


class MadeUpEvaluator:
    """Likelihoods that a hash of plan and pair decides: likely answers of a merge of few members, and greedy often.

    Args:
        refuses: part of the labels of plans that cannot be measured. log: of (plan, number of pairs) that were run.
    """

    name = "transformers"

    def __init__(self, log: list[tuple[str, int]], refuses: str | None = None) -> None:
        self._log, self._refuses, self._plan = log, refuses, ""

    def load(self, resolved) -> None:
        self._plan = resolved.plan.label
        if self._refuses and self._refuses in self._plan:
            raise CheckpointError(f"{self._plan} holds NaN")

    def log_likelihoods(self, pairs, padded=False):
        assert padded  # nothing else is asked of it, and it may run them together
        self._log.append((self._plan, len(pairs)))
        found = []
        for before, after in pairs:
            seed = hashlib.blake2b(f"{self._plan} {before} {after}".encode(), digest_size=4).digest()
            draw = np.random.default_rng(int.from_bytes(seed, "little")).random(2)
            greedy = bool(draw[0] < 0.6)
            each = np.log(0.5 + 0.5 * draw[1]) if greedy else np.log(0.5 * draw[1] + 1e-6)
            found.append(LogLikelihood(float(each * len(after)), len(after), greedy, float(np.exp(each))))
        return found
