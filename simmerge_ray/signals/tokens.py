"""What every checkpoint is run over: the probes' tokens, the base's greedy continuation, and the sampled positions.

Signals are taken at a fixed sample of token positions per task, the same for all checkpoints. A position is *prompt*
when its token belongs to the probe, *greedy* when it belongs to the continuation that the base wrote. The first token
of a probe is never sampled: its context is the same for all probes and its attention row is 1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from simmerge_ray.base.errors import ProbeError
from simmerge_ray.base.storage import digest_bytes, digest_json
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.probes import ProbeSet, TokenBatch
from simmerge_ray.checkpoints.references import context_limit
from simmerge_ray.checkpoints.tokenizers import load_tokenizer
from simmerge_ray.signals.signature import GREEDY_SHARE, NUM_GREEDY_TOKENS, SignatureSpec

Place = tuple[int, int, int]  # (micro-batch, row, column)


@dataclass(frozen=True)
class ProbeBatch:
    """One micro-batch, the fixed unit of work: B right-padded rows of T tokens, S sampled positions.

    input_ids, attention_mask: (B, T) int64. rows, columns: (S,) int64, where the sampled positions lie.
    greedy: (S,) bool. with_attention: (S,) bool, whether the attention rows of the position are kept.
    next_token: (S,) int64, the probe's own next token; -1 where it has none (its last token, greedy positions).
    probe: (S,) int64, index of the probe in its set.
    """

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    columns: Tensor
    greedy: Tensor
    with_attention: Tensor
    next_token: Tensor
    probe: Tensor


@dataclass(frozen=True)
class ProbeTokens:
    """The micro-batches of one task. Two checkpoints' outputs can be compared when `digest` is the same."""

    task: str
    batches: tuple[ProbeBatch, ...]

    @property
    def max_tokens(self) -> int:
        """Longest row in tokens, padding included."""
        return max(batch.input_ids.shape[1] for batch in self.batches)

    @property
    def digest(self) -> str:
        """Identity of the tokens, their micro-batches and the sampled positions."""
        parts = []
        for batch in self.batches:
            for field in (batch.input_ids, batch.attention_mask, batch.rows, batch.columns, batch.with_attention):
                parts.append(f"{tuple(field.shape)}".encode())
                parts.append(field.to(torch.int64).numpy().tobytes())
        return digest_bytes(*parts)


def tokenize_probes(
    catalogue: Catalogue, probe_sets: Mapping[str, ProbeSet], spec: SignatureSpec, num_answer_tokens: int = 0
) -> dict[str, list[TokenBatch]]:
    """Micro-batches of every task, by the catalogue's tokenizer.

    Args:
        num_answer_tokens: room that members' own answers need behind a probe.

    Raises:
        ProbeError: a probe is too short or too long, also for the context of the checkpoints.
    """
    first = catalogue.checkpoints[0]
    tokenizer = load_tokenizer(first)
    batches = {t: probes.token_batches(tokenizer, spec.batch_size, spec.max_tokens) for t, probes in probe_sets.items()}
    added = max(NUM_GREEDY_TOKENS if catalogue.base else 0, num_answer_tokens)
    for ref in catalogue.all_refs:
        context = context_limit(ref) or math.inf
        for task, found in batches.items():
            longest = max(batch.input_ids.shape[1] for batch in found)
            if longest + added > context:
                raise ProbeError(
                    f"probe set {task!r}: a probe of {longest} tokens and {added} of its continuation are "
                    f"longer than the context of checkpoint {ref.id!r}, {context} tokens; shorten the probe"
                )
    return batches


def greedy_places(task: str, batches: Sequence[TokenBatch], num_positions: int, num_tokens: int) -> list[Place]:
    """Which greedy positions are sampled, (micro-batch, row, step) in order: a quarter of `num_positions`.

    They are spread over as many probes as possible, so that the base writes a continuation of no more than these.
    """
    probes = [(number, row) for number, batch in enumerate(batches) for row in range(len(batch.input_ids))]
    generator = np.random.default_rng(_seed(f"greedy {task}", batches))
    count = min(math.ceil(num_positions / GREEDY_SHARE), len(probes) * num_tokens)
    order = generator.permutation(len(probes))
    steps = [generator.permutation(num_tokens) for _ in probes]
    chosen = [(probes[order[n % len(probes)]], int(steps[n % len(probes)][n // len(probes)])) for n in range(count)]
    return sorted((number, row, step) for (number, row), step in chosen)


def continued_batches(batches: Sequence[TokenBatch], places: Sequence[Place], batch_size: int) -> list[TokenBatch]:
    """The probes that need a continuation, in order, in micro-batches of their own."""
    rows = [
        batches[number].input_ids[row, : int(batches[number].attention_mask[row].sum())]
        for number, row in dict.fromkeys((number, row) for number, row, _ in places)
    ]
    return [_padded(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def probe_tokens(
    task: str,
    batches: Sequence[TokenBatch],
    greedy: Sequence[Place],
    continuations: Tensor,
    num_positions: int,
    num_attention_positions: int,
) -> ProbeTokens:
    """Append the continuations and sample the positions.

    Args:
        greedy: from `greedy_places`; none without a base.
        continuations: (n, G) int64, the base's greedy tokens for the rows of `continued_batches`, in their order.
        num_positions: prompt positions to sample, uniformly over all of the task; all where there are fewer.
        num_attention_positions: at how many of the sampled positions attention rows are kept.

    Raises:
        ProbeError: no sampled position has a next token, so that there would be no loss.
    """
    lengths = [batch.attention_mask.sum(1) for batch in batches]
    prompt = [
        (number, row, column)
        for number, rows in enumerate(lengths)
        for row, length in enumerate(rows.tolist())
        for column in range(1, length)
    ]
    generator = np.random.default_rng(_seed(task, batches))
    chosen = list(prompt)
    if len(prompt) > num_positions:
        chosen = [prompt[index] for index in generator.choice(len(prompt), num_positions, replace=False)]
    chosen += [(number, row, int(lengths[number][row]) + step) for number, row, step in greedy]
    chosen.sort()
    keep = np.zeros(len(chosen), dtype=bool)
    keep[generator.permutation(len(chosen))[:num_attention_positions]] = True
    written = dict(zip(dict.fromkeys((number, row) for number, row, _ in greedy), continuations, strict=True))
    first_probe = np.cumsum([0, *map(len, lengths)]).tolist()
    probe_batches = []
    for number, batch in enumerate(batches):
        extended = _extended(batch, {row: tokens for (owner, row), tokens in written.items() if owner == number})
        index = [place for place, (owner, _, _) in enumerate(chosen) if owner == number]
        rows, columns = torch.tensor([chosen[place][1:] for place in index], dtype=torch.int64).reshape(-1, 2).unbind(1)
        length = lengths[number][rows]  # of the probes without their continuations
        following = extended.input_ids[rows, (columns + 1).clamp_max(extended.input_ids.shape[1] - 1)]
        probe_batches.append(
            ProbeBatch(
                extended.input_ids,
                extended.attention_mask,
                rows.contiguous(),
                columns.contiguous(),
                greedy=columns >= length,
                with_attention=torch.from_numpy(keep[index]),
                next_token=torch.where(columns + 1 < length, following, -1),
                probe=rows + first_probe[number],
            )
        )
    if not any(bool((batch.next_token >= 0).any()) for batch in probe_batches):
        raise ProbeError(f"probe set {task!r}: no probe has 3 tokens or more, so there is no next token to compare")
    return ProbeTokens(task, tuple(probe_batches))


def continuation_key(base_digest: str, batch: TokenBatch, num_tokens: int) -> str:
    """Name under which the base's continuation of a micro-batch is kept."""
    ids = digest_bytes(batch.input_ids.numpy().tobytes(), batch.attention_mask.numpy().tobytes())
    return digest_json(["continuation", 1, base_digest, ids, list(batch.input_ids.shape), num_tokens])


def _extended(batch: TokenBatch, continuations: dict[int, Tensor]) -> TokenBatch:
    """The rows, some with a continuation right behind their last token."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return _padded(
        [
            torch.cat((batch.input_ids[row, :length], continuations.get(row, nothing)))
            for row, length in enumerate(batch.attention_mask.sum(1).tolist())
        ]
    )


def _padded(rows: Sequence[Tensor]) -> TokenBatch:
    masks = [torch.ones_like(row) for row in rows]
    return TokenBatch(pad_sequence(list(rows), batch_first=True), pad_sequence(masks, batch_first=True))


def _seed(task: str, batches: Sequence[TokenBatch]) -> int:
    """From the tokens, so that the sample is the same wherever and whenever it is drawn."""
    state = hashlib.blake2b(task.encode(), digest_size=8)
    for batch in batches:
        state.update(batch.input_ids.numpy().tobytes())
    return int.from_bytes(state.digest(), "little")


def left_padded(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """(input ids, attention mask) with the padding in front, where generation needs it."""
    width = batch.input_ids.shape[1]
    shift = width - batch.attention_mask.sum(1, keepdim=True)
    source = torch.arange(width)[None, :] - shift  # negative in the padding
    ids = batch.input_ids.gather(1, source.clamp_min(0))
    return torch.where(source >= 0, ids, 0), (source >= 0).to(torch.int64)
