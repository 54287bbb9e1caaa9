"""Where things lie in a run directory; every stage reads and writes only these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from simmerge_ray.base.storage import RemotePath

AnyPlace = TypeVar("AnyPlace", Path, RemotePath)


class _Below:
    """A place of that name below the root of a `RunLayout`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, layout: RunLayout[AnyPlace], owner: Any) -> AnyPlace:
        return layout.root / self._name


@dataclass(frozen=True)
class RunLayout(Generic[AnyPlace]):
    """Paths below the directory of a run."""

    root: AnyPlace

    log = _Below("simmerge.log")
    zoo = _Below("zoo")
    catalogue = _Below("zoo/catalogue.yaml")
    probes = _Below("zoo/probes")
    tasks = _Below("zoo/tasks")
    signals = _Below("signals/pairs.parquet")
    labels = _Below("labels")
    found = _Below("labels/_search")  # what the search found, beside its labels
    headroom = _Below("labels/_search/headroom.json")
    selector = _Below("selector")
    crossval = _Below("crossval.json")
    choices = _Below("choices")
    pick = _Below("pick")
    report = _Below("report")
