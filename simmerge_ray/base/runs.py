"""Where things lie in a run directory; every stage reads and writes only these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from simmerge_ray.base.storage import RemotePath

AnyPlace = TypeVar("AnyPlace", Path, RemotePath)


@dataclass(frozen=True)
class RunLayout(Generic[AnyPlace]):
    """Paths below the directory of a run."""

    root: AnyPlace

    @property
    def log(self) -> AnyPlace:
        return self.root / "simmerge.log"

    @property
    def zoo(self) -> AnyPlace:
        return self.root / "zoo"

    @property
    def catalogue(self) -> AnyPlace:
        return self.zoo / "catalogue.yaml"

    @property
    def probes(self) -> AnyPlace:
        return self.zoo / "probes"

    @property
    def tasks(self) -> AnyPlace:
        return self.zoo / "tasks"

    @property
    def signals(self) -> AnyPlace:
        return self.root / "signals" / "pairs.parquet"

    @property
    def labels(self) -> AnyPlace:
        return self.root / "labels"

    @property
    def found(self) -> AnyPlace:
        """What the search found, beside its labels."""
        return self.labels / "_search"

    @property
    def headroom(self) -> AnyPlace:
        return self.found / "headroom.json"

    @property
    def selector(self) -> AnyPlace:
        return self.root / "selector"

    @property
    def crossval(self) -> AnyPlace:
        return self.root / "crossval.json"

    @property
    def pick(self) -> AnyPlace:
        return self.root / "pick"

    @property
    def report(self) -> AnyPlace:
        return self.root / "report"
