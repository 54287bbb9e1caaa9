"""What one model keeps of every member's own answers: the report card of a merge, whoever made it.

Each member writes its answers to its task's probes; then base and model are run over probe and answer (`scores`). No
label is needed. One model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from simmerge_ray.base.errors import ProbeError
from simmerge_ray.base.progress import Report
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.probes import ProbeSet, TokenBatch
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.model import end_of_text
from simmerge_ray.signals.candidates.answers import (
    AnswerBatch,
    Answers,
    AnswerSpec,
    answer_logits,
    check_answered,
    join_answers,
    kept_log_probabilities,
    kept_tokens,
    write_answers,
)
from simmerge_ray.signals.candidates.scores import AnswerScores, join_scores, score_answers
from simmerge_ray.signals.collect import ProbeModel, check_logits

_NGRAM = 3


@dataclass(frozen=True)
class MemberRetention:
    """What a model keeps of one member. scores, base_scores: of the member's answers by the model and by the base (None
    without one). repetition: share of the tokens of the model's own answers that repeat an earlier trigram of theirs.
    own, answers: token ids of the member's and of the model's own answers, by probe."""

    member: str
    task: str
    scores: AnswerScores
    base_scores: AnswerScores | None
    repetition: float
    own: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]

    def most_different(self, count: int) -> list[int]:
        """Numbers of the probes with the largest KL a token, the largest first."""
        return [int(n) for n in np.argsort(-self.scores.kl / self.scores.num_tokens, kind="stable")[:count]]


@dataclass(frozen=True)
class _Card:
    """What is known of one member before the model is run: its answers, kept tokens and log-probabilities by batch."""

    member: CheckpointRef
    task: str
    batches: Sequence[TokenBatch]
    answers: Answers
    own_logits: Sequence[torch.Tensor]


def member_retentions(
    model: CheckpointRef,
    catalogue: Catalogue,
    batches: Mapping[str, Sequence[TokenBatch]],
    spec: AnswerSpec | None = None,
    device: str = "cpu",
    progress: Report | None = None,
    known: Mapping[str, Answers] | None = None,
) -> list[MemberRetention]:
    """Retention of every member of a catalogue by a model, in the catalogue's order.

    Args:
        batches: micro-batches of the probes of every member's own task (`tokens.tokenize_probes`).
        known: answers by member, of these batches, that need not be written again.

    Raises:
        ProbeError: a member's answers are all empty. CheckpointError: a checkpoint cannot be loaded, or its logits are
            not finite.
    """
    spec, runner, known = spec or AnswerSpec(), ProbeModel(device=device), known or {}
    total, cards = 2 * len(catalogue.checkpoints) + (catalogue.base is not None), []
    for number, member in enumerate(catalogue.checkpoints):
        task = catalogue.own_task[member.id]
        assert task is not None, "checked by `check_members`"
        answers = known.get(member.id) or answers_of(runner, member, task, batches[task], spec)
        cards.append(_Card(member, task, batches[task], answers, _logits(runner, member, answers)))
        if progress:
            progress(number + 1, total)
    base_logits: list[list[torch.Tensor] | None] = [None] * len(cards)
    if (base := catalogue.base) is not None:
        base_logits = [_logits(runner, base, card.answers) for card in cards]
    found = []
    for number, (card, of_base) in enumerate(zip(cards, base_logits, strict=True)):
        found.append(_compared(runner, model, card, of_base, spec))
        if progress:
            progress(total - len(cards) + number + 1, total)
    return found


def check_members(catalogue: Catalogue, probe_sets: Mapping[str, ProbeSet]) -> None:
    """Refuse members whose answers cannot be asked for, all at once.

    Raises:
        ProbeError: a member without a task, or without probes of it; with the remedy.
    """
    problems = []
    for member in catalogue.ids:
        task = catalogue.own_task.get(member)
        if task is None:
            problems.append(f"checkpoint {member!r} has no task; give it one in the catalogue (`task: NAME`)")
        elif task not in probe_sets:
            problems.append(f"checkpoint {member!r}: no probes of its task; write {task}.jsonl, a `text` a line")
    if problems:
        raise ProbeError("\n  ".join(problems))


def answers_of(
    runner: ProbeModel, member: CheckpointRef, task: str, batches: Sequence[TokenBatch], spec: AnswerSpec
) -> Answers:
    """A member's own greedy answers to the probes of its task.

    Raises:
        ProbeError: see `check_answered`.
    """
    written = _written(runner, member, batches, spec)
    check_answered(member.id, task, [answer for answers in written for answer in answers], spec.max_tokens)
    return join_answers(batches, written, task)


def _written(
    runner: ProbeModel, ref: CheckpointRef, batches: Sequence[TokenBatch], spec: AnswerSpec
) -> list[list[list[int]]]:
    ends = [int(token) for token in end_of_text(ref, runner.load(ref).config)]
    return [write_answers(runner.load(ref), batch, ends, spec.max_tokens) for batch in batches]


@torch.no_grad()
def _logits(runner: ProbeModel, ref: CheckpointRef, answers: Answers) -> list[torch.Tensor]:
    logits = [answer_logits(runner.load(ref), batch).cpu() for batch in answers.batches]
    for one in logits:
        check_logits(ref, one)
    return logits


def _compared(
    runner: ProbeModel,
    model: CheckpointRef,
    card: _Card,
    base_logits: Sequence[torch.Tensor] | None,
    spec: AnswerSpec,
) -> MemberRetention:
    parts, base_parts = [], []
    for number, (batch, logits) in enumerate(
        zip(card.answers.batches, _logits(runner, model, card.answers), strict=True)
    ):
        own, of_base = card.own_logits[number], None if base_logits is None else base_logits[number]
        kept = kept_tokens(own, of_base, spec.num_kept)
        of_own = kept_log_probabilities(own, kept)
        parts.append(_scored(batch, logits, kept, of_own))
        if of_base is not None:
            base_parts.append(_scored(batch, of_base, kept, of_own))
    answers = [tuple(one) for batch in _written(runner, model, card.batches, spec) for one in batch]
    own_answers = np.split(card.answers.tokens, np.flatnonzero(np.diff(card.answers.answer)) + 1)
    return MemberRetention(
        card.member.id,
        card.task,
        join_scores(parts),
        join_scores(base_parts) if base_parts else None,
        repetition(answers),
        tuple(tuple(int(token) for token in one) for one in own_answers),
        tuple(answers),
    )


def _scored(
    batch: AnswerBatch, logits: torch.Tensor, kept: np.ndarray, of_own: tuple[np.ndarray, np.ndarray]
) -> AnswerScores:
    likely, rest = kept_log_probabilities(logits, kept)
    best = (logits.argmax(-1) == batch.tokens).numpy()
    return score_answers(likely, rest, best, of_own[0], of_own[1], batch.answer.numpy())


def repetition(answers: Sequence[Sequence[int]]) -> float:
    """Share of the trigrams of all answers that stood in the same answer before; in [0, 1], 0 without any."""
    grams = [[tuple(one[n : n + _NGRAM]) for n in range(len(one) - _NGRAM + 1)] for one in answers]
    total = sum(map(len, grams))
    return 1.0 - sum(len(set(one)) for one in grams) / total if total else 0.0
