"""Units of work that fill signatures with answers: what one checkpoint does on one micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from simmerge_ray.checkpoints.probes import TokenBatch
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.model import end_of_text
from simmerge_ray.plans.plan import ResolvedPlan
from simmerge_ray.signals.candidates.answers import (
    AnswerBatch,
    AnswerSpec,
    Likeliest,
    answer_logits,
    join_answers,
    kept_log_probabilities,
    likeliest_tokens,
    write_answers,
)
from simmerge_ray.signals.collect import ProbeModel, check_logits


def written_answers(
    model: ProbeModel, ref: CheckpointRef, batch: TokenBatch, spec: AnswerSpec
) -> tuple[np.ndarray, Likeliest]:
    """A checkpoint's own answers, (B, `spec.max_tokens`) int64, -1 behind their ends; and its `likeliest` tokens."""
    loaded = model.load(ref)
    ends = [int(token) for token in end_of_text(ref, loaded.config)]
    answers = write_answers(loaded, batch, ends, spec.max_tokens)
    padded = np.full((len(answers), spec.max_tokens), -1, dtype=np.int64)
    for row, answer in enumerate(answers):
        padded[row, : len(answer)] = answer
    return padded, likeliest(model, ref, join_answers([batch], [answers], ref.id).batches[0], spec.num_kept)


def likeliest(model: ProbeModel, ref: CheckpointRef, batch: AnswerBatch, count: int) -> Likeliest:
    """`likeliest_tokens` of a checkpoint at the answers' positions."""
    return likeliest_tokens(_logits(model, ref, batch), count)


def kept(
    model: ProbeModel, source: CheckpointRef | ResolvedPlan, batch: AnswerBatch, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the kept tokens (S, K), and of all others together (S,), float32."""
    return kept_log_probabilities(_logits(model, source, batch).cpu(), tokens)


def kept_of_merge(
    model: ProbeModel, first: CheckpointRef, batch: AnswerBatch, tokens: np.ndarray, merge: ResolvedPlan
) -> tuple[np.ndarray, np.ndarray]:
    """`kept` of a merge, which is made in memory. first: a member of it."""
    del first
    return kept(model, merge, batch, tokens)


@torch.no_grad()
def _logits(model: ProbeModel, source: CheckpointRef | ResolvedPlan, batch: AnswerBatch) -> torch.Tensor:
    logits = answer_logits(model.load(source), batch)
    check_logits(source, logits)
    return logits


ANSWER_UNITS: dict[str, Callable[..., Any]] = {
    "answers": written_answers,
    "likeliest": likeliest,
    "kept": kept,
    "kept of merge": kept_of_merge,
}
