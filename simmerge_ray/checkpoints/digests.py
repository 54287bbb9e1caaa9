"""Digests of checkpoints, kept beside the fingerprints of their files: every byte is read once, not in every stage.

A cache directory holds one JSON file per fingerprint. It is a help, never a source: what is absent, damaged or cannot
be written is computed again.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from simmerge_ray.base.storage import digest_bytes, write_atomically
from simmerge_ray.checkpoints.references import CheckpointRef, checkpoint_digest, checkpoint_fingerprint

DEFAULT_CACHE = Path("~/.cache/simmerge_ray/checkpoints/digests")


def cached_digest(ref: CheckpointRef, cache: Path = DEFAULT_CACHE) -> str:
    """`checkpoint_digest`, taken from `cache` while the files lie where they lay with their sizes and times of change.

    Safe with several writers. Weights that are replaced by others of the same size and time of change go unnoticed.

    Raises:
        CheckpointError: the checkpoint or its adapter is missing or unreadable.
    """
    entry = DigestEntry(ref, cache)
    if (found := entry.read()) is not None:
        return found
    digest = checkpoint_digest(ref)
    entry.keep(digest)
    return digest


class DigestEntry:
    """What a cache says of a checkpoint, as its files are now.

    Raises:
        CheckpointError: the checkpoint or its adapter is missing or unreadable.
    """

    def __init__(self, ref: CheckpointRef, cache: Path = DEFAULT_CACHE) -> None:
        self._ref, self.fingerprint = ref, _fingerprint(ref)
        try:
            self._file: Path | None = cache.expanduser() / f"{self.fingerprint}.json"
        except RuntimeError:  # a user without a home directory
            self._file = None

    def read(self) -> str | None:
        """The digest; None where the cache has none."""
        return _read(self._file) if self._file is not None else None

    def keep(self, digest: str) -> None:
        """Keep a digest that was computed since, unless somebody wrote the files meanwhile."""
        if self._file is not None and _fingerprint(self._ref) == self.fingerprint:
            _write(self._file, self._ref, digest)


def _fingerprint(ref: CheckpointRef) -> str:
    """Fingerprint of the files and the absolute paths where they lie."""
    paths = [str(path.resolve()).encode() for path in (ref.path, ref.adapter) if path is not None]
    return digest_bytes(checkpoint_fingerprint(ref).encode(), *paths)


def _read(file: Path) -> str | None:
    try:
        digest = json.loads(file.read_text())["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return digest if isinstance(digest, str) and re.fullmatch("[0-9a-f]{32}", digest) else None


def _write(file: Path, ref: CheckpointRef, digest: str) -> None:
    entry = {"digest": digest, "path": str(ref.path), "adapter": str(ref.adapter) if ref.adapter else None}
    try:
        write_atomically(file, (json.dumps(entry) + "\n").encode())
    except OSError:
        return
