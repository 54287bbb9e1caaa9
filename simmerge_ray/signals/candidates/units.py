"""Units of work that fill signatures with answers: what one checkpoint does on one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from simmerge_ray.checkpoints.probes import TokenBatch
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.merging.model import end_of_text
from simmerge_ray.signals.candidates.answers import (
    AnswerBatch,
    AnswerSpec,
    answer_logits,
    join_answers,
    kept_log_probabilities,
    write_answers,
)
from simmerge_ray.signals.collect import ProbeModel, check_logits

Likeliest = tuple[np.ndarray, np.ndarray]


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
    """(S, K) int64: the likeliest tokens of each position, and (S, K) float32 their log-probabilities."""
    found = _logits(model, ref, batch).log_softmax(-1)
    values, tokens = found.topk(min(count, found.shape[1]), dim=-1)
    return tokens.cpu().numpy(), values.float().cpu().numpy()


def kept(
    model: ProbeModel, ref: CheckpointRef, batch: AnswerBatch, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the kept tokens (S, K), and of all others together (S,), float32."""
    return kept_log_probabilities(_logits(model, ref, batch).cpu(), tokens)


@torch.no_grad()
def _logits(model: ProbeModel, ref: CheckpointRef, batch: AnswerBatch) -> torch.Tensor:
    logits = answer_logits(model.load(ref), batch)
    check_logits(ref, logits)
    return logits


def chosen_tokens(answer: np.ndarray, parts: Sequence[Likeliest], num_kept: int) -> np.ndarray:
    """Which tokens of each position are kept, (S, K) int64: the answer's own first, then those that are likeliest for
    the answering checkpoint or for the base, so that the choice does not depend on the rest of the catalogue.

    A token that is missing from one of the lists is less likely there than all that stand in it, so that the choice is
    that of the whole vocabulary.

    Args:
        answer: (S,) the answer's tokens. parts: `likeliest` of the answering checkpoint, and of the base if there is
            one.
    """
    width = min(num_kept, parts[0][0].shape[1])
    rows = []
    for position, own in enumerate(answer.tolist()):
        best: dict[int, float] = {}
        for tokens, values in parts:
            for token, value in zip(tokens[position].tolist(), values[position].tolist(), strict=True):
                best[token] = max(value, best.get(token, -np.inf))
        best.pop(own, None)
        ordered = sorted(best, key=lambda token: (-best[token], token))
        rows.append([own, *ordered[: width - 1]])
    return np.array(rows, dtype=np.int64)


ANSWER_UNITS: dict[str, Callable[..., Any]] = {"answers": written_answers, "likeliest": likeliest, "kept": kept}
