"""Where things lie in a run directory; every stage reads and writes only these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunLayout:
    """Paths below the directory of a run."""

    root: Path

    @property
    def log(self) -> Path:
        return self.root / "simmerge.log"

    @property
    def zoo(self) -> Path:
        return self.root / "zoo"

    @property
    def catalogue(self) -> Path:
        return self.zoo / "catalogue.yaml"

    @property
    def probes(self) -> Path:
        return self.zoo / "probes"

    @property
    def tasks(self) -> Path:
        return self.zoo / "tasks"

    @property
    def signals(self) -> Path:
        return self.root / "signals" / "pairs.parquet"

    @property
    def labels(self) -> Path:
        return self.root / "labels"

    @property
    def found(self) -> Path:
        """What the search found, beside its labels."""
        return self.labels / "_search"

    @property
    def headroom(self) -> Path:
        return self.found / "headroom.json"

    @property
    def selector(self) -> Path:
        return self.root / "selector"

    @property
    def crossval(self) -> Path:
        return self.root / "crossval.json"

    @property
    def pick(self) -> Path:
        return self.root / "pick"

    @property
    def report(self) -> Path:
        return self.root / "report"
