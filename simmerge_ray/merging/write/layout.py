"""Where every byte of a merged checkpoint goes, computed before any weight is read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simmerge_ray.base.errors import OutputError
from simmerge_ray.merging.graph import DTYPE_BYTES, OutputTensor

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Placement:
    """A tensor's place in an output file, in bytes from its start."""

    output: OutputTensor
    file: str
    offset: int


@dataclass(frozen=True)
class Shard:
    """One output file: its header (length prefix included), its size in all, and the tensors in it."""

    file: str
    header: bytes
    num_bytes: int
    placements: tuple[Placement, ...]


@dataclass(frozen=True)
class Layout:
    """The output files in name order."""

    shards: tuple[Shard, ...]

    @property
    def placements(self) -> list[Placement]:
        return [placement for shard in self.shards for placement in shard.placements]

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    def index(self) -> str | None:
        """Content of `model.safetensors.index.json`; None for a single file."""
        if len(self.shards) == 1:
            return None
        total = sum(placement.output.num_bytes for placement in self.placements)
        weight_map = {p.output.name: p.file for p in sorted(self.placements, key=lambda p: p.output.name)}
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)


def plan_layout(outputs: Sequence[OutputTensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> Layout:
    """Shards in name order, none over the limit unless a single tensor is; wide dtypes first within one (alignment)."""
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    for output in outputs:
        if groups[-1] and filled + output.num_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += output.num_bytes
    shards = []
    for number, group in enumerate(groups, 1):
        single = len(groups) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        ordered = sorted(group, key=lambda output: (-DTYPE_BYTES[output.dtype], output.name))
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ends, end = [], 0
        for output in ordered:
            entries[output.name] = {
                "dtype": output.dtype,
                "shape": list(output.shape),
                "data_offsets": [end, end + output.num_bytes],
            }
            ends.append(end)
            end += output.num_bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = struct.pack("<Q", len(text)) + text
        begins = zip(ordered, ends, strict=True)
        placements = tuple(Placement(output, file, len(header) + begin) for output, begin in begins)
        shards.append(Shard(file, header, len(header) + end, placements))
    return Layout(tuple(shards))


def preallocate(directory: Path, layout: Layout) -> None:
    """Create every file in its final size with its header; an OutputError where there is too little space."""
    try:
        for shard in layout.shards:
            descriptor = os.open(directory / shard.file, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.posix_fallocate(descriptor, 0, shard.num_bytes)
                os.pwrite(descriptor, shard.header, 0)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise OutputError(f"cannot write {layout.num_bytes / 1e9:.2f} GB to {directory}: {error.strerror}") from None
