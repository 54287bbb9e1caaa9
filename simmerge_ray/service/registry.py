"""Published selectors, a directory for each version: what a log's decisions are made with, and folded again with.

    REGISTRY/<model_version>/selector.json, selector.safetensors, shortlist/, parents.json, warm_start.*

A version is the digest of what a selector was trained from, so publishing one twice changes nothing. Nothing is ever
deleted here: a roll back, or the fold of an old log, needs the former versions.
"""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from simmerge_ray.base.errors import SelectorError, StoreError
from simmerge_ray.base.storage import CONTENTS, Place, local_directory, publish_directory
from simmerge_ray.selector.models.model import Selector, read_selector
from simmerge_ray.selector.planning.files import SHORTLIST
from simmerge_ray.service.bandit.artifact import WarmStartFile, read_warm_start

_KEPT = 4  # versions in memory: the present one, and what a fold over old epochs needs


@dataclass(frozen=True)
class Published:
    """A version. shortlist: the selector of `second_order` features; warm: what the arms start from; None without."""

    version: str
    selector: Selector
    shortlist: Selector | None
    warm: WarmStartFile | None


_left_out = shutil.ignore_patterns("figures", "*.md", "manifest.json", CONTENTS)


class Registry:
    """Versions of selectors below one directory. Threads and processes may share it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read, self._lock = lru_cache(_KEPT)(self._loaded), threading.Lock()

    def publish(self, selector: Place) -> str:
        """Copy an artifact, from a directory or a store, and return its version; an existing version is left unchanged.
        Raises SelectorError: it cannot be read.
        """
        version = read_selector(selector).version
        target = self._directory / version
        if not target.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            partial = self._directory / f".{version}.{threading.get_ident()}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            with local_directory(selector) as found:
                shutil.copytree(found, partial, ignore=_left_out)
            try:
                publish_directory(partial, target)
            except OSError:
                shutil.rmtree(partial, ignore_errors=True)
                if not target.exists():  # else somebody else has published the same
                    raise
        return version

    def path(self, version: str) -> Path:
        """Where the artifact of a version lies. Raises SelectorError: it was never published here."""
        found = self._directory / version
        if not version or version != Path(version).name or not found.is_dir():
            raise SelectorError(f"no selector of version {version!r} in {self._directory}; publish it there")
        return found

    def load(self, version: str) -> Published:
        """A version, from memory where it was asked for lately.
        Raises StoreError: it is not there (yet), or cannot be read: the log names it, so this is no mistake of a
        client.
        """
        with self._lock:
            return self._read(version)

    def _loaded(self, version: str) -> Published:
        try:
            path = self.path(version)
            shortlist = read_selector(path / SHORTLIST) if (path / SHORTLIST).is_dir() else None
            return Published(version, read_selector(path), shortlist, read_warm_start(path))
        except SelectorError as error:
            raise StoreError(f"the selector that the log names cannot be loaded: {error}") from error
