"""Labels and signals of a study as a few small files, for others to compute its results again."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from simmerge_ray.base.storage import write_atomically
from simmerge_ray.research.study.layout import LoadedPart
from simmerge_ray.search.labels import LabelStore


def export_dataset(parts: Sequence[LoadedPart], directory: Path) -> Path:
    """Write `labels.parquet` (returned) and `signals/<part>.parquet`, a data set as `simmerge train` takes it."""
    with tempfile.TemporaryDirectory() as scratch:
        store = LabelStore(scratch)
        store.append([label for part in parts for label in part.labels])
        store.compact()
        (made,) = Path(scratch).glob("*.parquet")
        write_atomically(directory / "labels.parquet", made.read_bytes())
    for part in parts:
        part.table.write(directory / "signals" / f"{part.name}.parquet")
    return directory / "labels.parquet"
