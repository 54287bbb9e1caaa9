"""Probes: unlabeled texts, the prompt only, over which checkpoints are compared.

A probe set is one JSONL file per task, `{"text": "..."}` a line; the file's stem is the task. Its digest stands in
every artifact that was computed from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmerge_ray.base.errors import ProbeError, shown_value
from simmerge_ray.base.storage import Place, digest_bytes, list_places, nothing_in, read_jsonl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Probe:
    """One unlabeled text."""

    text: str


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of one micro-batch, right-padded.

    input_ids, attention_mask: (num_probes, length) int64; positions with mask 0 are padding.
    """

    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class ProbeSet:
    """The ordered probes of one task."""

    task: str
    probes: tuple[Probe, ...]

    def __post_init__(self) -> None:
        if not self.probes:
            raise ProbeError(f"probe set {self.task!r} is empty; give at least one text")

    @property
    def digest(self) -> str:
        """Identity of the texts and their order."""
        return digest_bytes(*(probe.text.encode() for probe in self.probes))

    def token_batches(self, tokenizer: Any, batch_size: int, max_tokens: int) -> list[TokenBatch]:
        """Micro-batches of `batch_size` probes in order: the fixed unit of work.

        Raises ProbeError: a probe has fewer than two tokens (no next token to compare) or more than `max_tokens`.
        """
        import torch

        encoded = [tokenizer(probe.text)["input_ids"] for probe in self.probes]
        for probe, ids in zip(self.probes, encoded, strict=True):
            if not 2 <= len(ids) <= max_tokens:
                raise ProbeError(
                    f"probe set {self.task!r}: probe {probe.text[:40]!r} has {len(ids)} tokens; "
                    f"allowed are 2 to {max_tokens}"
                )
        batches = []
        for start in range(0, len(encoded), batch_size):
            rows = encoded[start : start + batch_size]
            length = max(map(len, rows))
            ids = torch.zeros((len(rows), length), dtype=torch.int64)
            mask = torch.zeros((len(rows), length), dtype=torch.int64)
            for index, row in enumerate(rows):
                ids[index, : len(row)] = torch.tensor(row)
                mask[index, : len(row)] = 1
            batches.append(TokenBatch(ids, mask))
        return batches


def load_probe_set(path: Place) -> ProbeSet:
    """Read one probe file. Raises ProbeError: unreadable, empty, or a line without a non-empty `text`."""
    probes = []
    for number, row in read_jsonl(path, ProbeError):
        text = row.get("text")
        if text is None and ("settings" in row or {"prompt", "target"} <= row.keys()):
            raise ProbeError(
                f"{path} is a task file (`prompt` and `target`); probes are prompts alone, a `text` a line: are the "
                "directories of probes and tasks swapped?"
            )
        if text is None and isinstance(row.get("prompt"), str):
            raise ProbeError(
                f"{path}, line {number}: a probe is a `text`, and this line has a `prompt`; "
                f"`simmerge init DIR ... --probes {path.stem}={path} --field prompt` makes probes of such a file"
            )
        if not isinstance(text, str) or not text:
            raise ProbeError(
                f"{path}, line {number}: a probe needs a non-empty string under 'text', got {shown_value(text)}"
            )
        probes.append(Probe(text))
    if not probes:
        raise ProbeError(f'{path} holds no probes; write one {{"text": ...}} a line')
    return ProbeSet(path.stem, tuple(probes))


def load_probe_sets(directory: Place) -> dict[str, ProbeSet]:
    """All `<task>.jsonl` files of a directory, by task; a ProbeError where there is none, or one is malformed."""
    paths = list_places(directory, "*.jsonl")
    if not paths:
        raise ProbeError(nothing_in(directory, "<task>.jsonl probe files"))
    return {path.stem: load_probe_set(path) for path in paths}


GENERAL = "general"


def general_probe_set() -> ProbeSet:
    """The probe set `general` that is shipped with the package, for when the task of a merge is unknown.

    48 prompts: 12 each of mathematics, code, several languages, and questions about a given passage.
    """
    return load_probe_set(Path(__file__).parent / f"{GENERAL}.jsonl")
