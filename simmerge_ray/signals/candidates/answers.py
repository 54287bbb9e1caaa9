"""A member's own greedy answers to its task's probes: what a merge is asked to give as well.

Answers need no labels. They are written once for each member, in fixed micro-batches, and end with the token that ends
a text or after `AnswerSpec.max_tokens`. A candidate is then run over probe and answer together (teacher forcing): the
logits at the position before each token of the answer say whether the candidate would give it. Shapes: B rows, T
tokens, S positions, V vocabulary, K kept tokens of a position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from simmerge_ray.base.errors import ProbeError
from simmerge_ray.base.storage import digest_bytes
from simmerge_ray.checkpoints.probes import TokenBatch
from simmerge_ray.signals.tokens import left_padded

Likeliest = tuple[np.ndarray, np.ndarray]  # tokens of each position and their log-probabilities


@dataclass(frozen=True)
class AnswerSpec:
    """max_tokens: longest answer. num_kept: tokens of a position whose log-probability is kept, the rest as one sum;
    a vocabulary of no more tokens is kept whole."""

    max_tokens: int = 16
    num_kept: int = 32


@dataclass(frozen=True)
class AnswerBatch:
    """One micro-batch of probes with their answers behind them, right-padded.

    input_ids, attention_mask: (B, T) int64. rows, columns: (S,) int64, the positions whose logits predict the tokens
    of the answers. tokens: (S,) int64, these tokens. answer: (S,) int64, which answer of the set a token belongs to.
    """

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    columns: Tensor
    tokens: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Answers:
    """All answers of one checkpoint to one task's probes, in the probes' order."""

    batches: tuple[AnswerBatch, ...]

    @property
    def num_answers(self) -> int:
        return sum(len(batch.input_ids) for batch in self.batches)

    @property
    def tokens(self) -> np.ndarray:
        """(S,) int64 over all micro-batches."""
        return torch.cat([batch.tokens for batch in self.batches]).numpy()

    @property
    def answer(self) -> np.ndarray:
        """(S,) int64 over all micro-batches, ascending."""
        return torch.cat([batch.answer for batch in self.batches]).numpy()

    @property
    def digest(self) -> str:
        """Identity of probes, answers and micro-batches."""
        parts = []
        for batch in self.batches:
            for field in (batch.input_ids, batch.attention_mask, batch.rows, batch.columns):
                parts += [f"{tuple(field.shape)}".encode(), field.numpy().tobytes()]
        return digest_bytes(*parts)

    def first(self, num_answers: int) -> Answers:
        """The answers to the first probes: a cheaper, coarser look."""
        kept, total = [], 0
        for batch in self.batches:
            if total >= num_answers:
                break
            rows = min(len(batch.input_ids), num_answers - total)
            total += rows
            of_rows = batch.rows < rows
            fields = (batch.rows, batch.columns, batch.tokens, batch.answer)
            kept.append(
                AnswerBatch(batch.input_ids[:rows], batch.attention_mask[:rows], *(field[of_rows] for field in fields))
            )
        return Answers(tuple(kept))

    def select(self, numbers: Sequence[int]) -> AnswerBatch:
        """The answers of these numbers as one micro-batch, in this order."""
        firsts = np.cumsum([0, *(len(batch.input_ids) for batch in self.batches)])
        ids, columns, tokens = [], [], []
        for number in map(int, numbers):
            place = int(np.searchsorted(firsts, number, side="right")) - 1
            batch, row = self.batches[place], number - int(firsts[place])
            ids.append(batch.input_ids[row][: int(batch.attention_mask[row].sum())])
            columns.append(batch.columns[batch.rows == row])
            tokens.append(batch.tokens[batch.rows == row])
        counts = torch.tensor([len(one) for one in tokens])
        masks = [torch.ones_like(one) for one in ids]
        return AnswerBatch(
            pad_sequence(ids, batch_first=True),
            pad_sequence(masks, batch_first=True),
            torch.repeat_interleave(torch.arange(len(ids)), counts),
            torch.cat(columns),
            torch.cat(tokens),
            torch.repeat_interleave(torch.as_tensor(numbers), counts),
        )


def join_answers(batches: Sequence[TokenBatch], written: Sequence[Sequence[Sequence[int]]], task: str) -> Answers:
    """Probes with their answers.

    Args:
        written: the tokens of each answer, by micro-batch and row.

    Raises:
        ProbeError: an answer without a token.
    """
    found, number = [], 0
    for batch, answers in zip(batches, written, strict=True):
        lengths = batch.attention_mask.sum(1).tolist()
        width = max(length + len(answer) for length, answer in zip(lengths, answers, strict=True))
        ids, mask = (torch.zeros((len(lengths), width), dtype=torch.int64) for _ in range(2))
        rows: list[int] = []
        columns: list[int] = []
        tokens: list[int] = []
        owners: list[int] = []
        for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
            if not answer:
                raise ProbeError(f"probe set {task!r}: probe {number + 1} has no answer")
            ids[row, :length] = batch.input_ids[row, :length]
            ids[row, length : length + len(answer)] = torch.tensor(answer)
            mask[row, : length + len(answer)] = 1
            rows += [row] * len(answer)
            columns += range(length - 1, length - 1 + len(answer))
            tokens += answer
            owners += [number] * len(answer)
            number += 1
        found.append(AnswerBatch(ids, mask, *(torch.tensor(one) for one in (rows, columns, tokens, owners))))
    return Answers(tuple(found))


def check_answered(checkpoint_id: str, task: str, answers: Iterable[Sequence[int]], max_tokens: int) -> None:
    """Refuse a checkpoint that ends every text at once. (Where an answer is one token at the most, the token that ends
    a text is one as well.)

    Raises:
        ProbeError: with the remedy.
    """
    if max(map(len, answers)) <= 1 < max_tokens:
        raise ProbeError(
            f"checkpoint {checkpoint_id!r} answers nothing to the probes of {task!r}; give prompts that it continues"
        )


@torch.no_grad()
def write_answers(model: Any, batch: TokenBatch, ends: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Greedy answers of a transformers model to one micro-batch, each up to and with a token that ends a text.

    Args:
        ends: tokens that end a text (`merging.model.end_of_text`).
    """
    from transformers import GenerationConfig

    ids, mask = left_padded(batch)
    # `generate` fills what is not given from the model, which may have come with another checkpoint's penalties.
    model.generation_config = GenerationConfig()
    settings = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, num_beams=1, pad_token_id=0, eos_token_id=list(ends) or None
    )
    device = model.device
    written = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=settings)
    stops = set(ends)
    answers = []
    for row in written[:, ids.shape[1] :].tolist():
        stop = next((place + 1 for place, token in enumerate(row) if token in stops), len(row))
        answers.append(row[:stop])
    return answers


def answer_logits(model: Any, batch: AnswerBatch) -> Tensor:
    """Logits of a transformers model at the answers' positions, (S, V), float32 (float64 of a float64 model), with
    their gradient where that is enabled.

    The head sees only these positions. Does not look whether they are finite.
    """
    device = model.device

    def on_head(_: Any, args: tuple[Any, ...]) -> Any:
        return (args[0][batch.rows.to(device), batch.columns.to(device)][None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(on_head)
    try:
        logits = model(
            input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device), use_cache=False
        ).logits[0]
    finally:
        handle.remove()
    return logits if logits.dtype == torch.float64 else logits.float()


def likeliest_tokens(logits: Tensor, count: int) -> Likeliest:
    """(S, K) int64: the likeliest tokens of each position of logits (S, V), and (S, K) float32 their
    log-probabilities."""
    values, tokens = logits.float().log_softmax(-1).topk(min(count, logits.shape[1]), dim=-1)
    return tokens.cpu().numpy(), values.cpu().numpy()


def kept_tokens(own: Tensor, base: Tensor | None, num_kept: int) -> np.ndarray:
    """`chosen_tokens` from logits (S, V) of the answering checkpoint and of the base (None without one)."""
    parts = [likeliest_tokens(logits, num_kept) for logits in (own, base) if logits is not None]
    return chosen_tokens(own.argmax(-1).cpu().numpy(), parts, num_kept)


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


def kept_log_probabilities(logits: Tensor, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the kept tokens (S, K), and of all others together (S,), float32; -inf where K is V."""
    upcast = logits.double()
    total = upcast.logsumexp(-1, keepdim=True)
    index = torch.from_numpy(kept)
    of_kept = upcast.gather(1, index)
    others = upcast.scatter(1, index, -torch.inf).logsumexp(-1, keepdim=True)
    return (of_kept - total).float().numpy(), (others - total)[:, 0].float().numpy()
