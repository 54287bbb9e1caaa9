"""Identity of checkpoints: the digest of their weights, and its cache beside the fingerprints of their files.

Every byte is read once, not in every stage. A cache directory holds one JSON file per fingerprint. It is a help, never
a source: what is absent, damaged or cannot be written is computed again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from simmerge_ray.base.storage import digest_bytes, file_version, open_ranges, read_bytes, read_json, write_atomically
from simmerge_ray.checkpoints.headers import TensorSpec, read_header, read_headers
from simmerge_ray.checkpoints.pickles import adapter_file
from simmerge_ray.checkpoints.references import ADAPTER_CONFIG, CheckpointRef

DEFAULT_CACHE = Path("~/.cache/simmerge_ray/checkpoints/digests")


def checkpoint_digest(ref: CheckpointRef) -> str:
    """Identity of a checkpoint: names, dtypes, shapes and bytes of its tensors, whatever the sharding.

    With an adapter its tensors and its `adapter_config.json` count, too. Reads every byte once.

    Raises CheckpointError: the checkpoint or its adapter is missing or unreadable.
    """
    state = hashlib.blake2b(digest_size=16)
    _add_tensors(state, read_headers(ref))
    if ref.adapter is not None:
        try:
            config = read_bytes(ref.adapter / ADAPTER_CONFIG)
        except OSError:
            raise ref.error(f"{ref.adapter} holds no {ADAPTER_CONFIG}") from None
        state.update(b"\0adapter\0" + len(config).to_bytes(8, "little") + config)
        _add_tensors(state, dict(sorted(read_header(ref, adapter_file(ref)).items())))
    return state.hexdigest()


def _add_tensors(state: hashlib.blake2b, specs: Mapping[str, TensorSpec]) -> None:
    readers = {file: open_ranges(file) for file in sorted({spec.file for spec in specs.values()}, key=str)}
    room = memoryview(bytearray(1 << 24))
    try:
        for name, spec in specs.items():
            state.update(f"{name}\0{spec.dtype}\0{spec.shape}\0".encode())
            for start in range(spec.begin, spec.end, len(room)):
                part = room[: min(len(room), spec.end - start)]
                state.update(part[: readers[spec.file].read_into(start, part, spec.end)])
    finally:
        for reader in readers.values():
            reader.close()


def checkpoint_fingerprint(ref: CheckpointRef) -> str:
    """Identity of the files: headers, sizes and times of change. Tells whether an interrupted merge may go on."""
    state = hashlib.blake2b(digest_size=16)
    for name, spec in read_headers(ref).items():
        state.update(f"{name}\0{spec.dtype}\0{spec.shape}\0{spec.file.name}\0{spec.begin}\0".encode())
    files = {spec.file for spec in read_headers(ref).values()}
    if ref.adapter is not None:
        files |= set(ref.adapter.glob("adapter_*"))
    for file in sorted(files, key=str):
        state.update(f"{file.name}\0{file_version(file)}\0".encode())
    return state.hexdigest()


def cached_digest(ref: CheckpointRef, cache: Path = DEFAULT_CACHE) -> str:
    """`checkpoint_digest`, taken from `cache` while the files have kept their paths, sizes and times of change.

    Safe with several writers. Weights that are replaced by others of the same size and time of change go unnoticed.
    """
    entry = DigestEntry(ref, cache)
    if (found := entry.read()) is not None:
        return found
    digest = checkpoint_digest(ref)
    entry.keep(digest)
    return digest


class DigestEntry:
    """The cached digest of a checkpoint, valid for its files as they are now."""

    def __init__(self, ref: CheckpointRef, cache: Path = DEFAULT_CACHE) -> None:
        self._ref, self.fingerprint = ref, _fingerprint(ref)
        try:
            self._file: Path | None = cache.expanduser() / f"{self.fingerprint}.json"
        except RuntimeError:  # a user without a home directory
            self._file = None

    def read(self) -> str | None:
        """The digest; None where the cache has none."""
        if self._file is None:
            return None
        try:
            digest = read_json(self._file)["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return digest if isinstance(digest, str) and re.fullmatch("[0-9a-f]{32}", digest) else None

    def keep(self, digest: str) -> None:
        """Keep a digest that was computed since, unless somebody wrote the files meanwhile."""
        ref = self._ref
        if self._file is None or _fingerprint(ref) != self.fingerprint:
            return
        entry = {"digest": digest, "path": str(ref.path), "adapter": str(ref.adapter) if ref.adapter else None}
        with suppress(OSError):
            write_atomically(self._file, (json.dumps(entry) + "\n").encode())


def _fingerprint(ref: CheckpointRef) -> str:
    """Fingerprint of the files and their absolute paths."""
    paths = [str(path.resolve()).encode() for path in (ref.path, ref.adapter) if path is not None]
    return digest_bytes(checkpoint_fingerprint(ref).encode(), *paths)
