"""Where things lie in the directory of a study, reading what is complete, and what is published of it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simmerge_ray.base.storage import read_json, write_atomically
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.search.labels import LabeledPlan, LabelStore
from simmerge_ray.signals.table import SignalTable, read_signal_table

NUM_PROBES_TRIED = (4, 16)  # beside all of them
WRONG_DOMAIN = "wrong"
PROBE_VARIANTS = (*map(str, NUM_PROBES_TRIED), WRONG_DOMAIN)


@dataclass(frozen=True)
class StudyLayout:
    """Paths below the directory of a study."""

    root: Path

    @property
    def zoo(self) -> Path:
        return self.root / "zoo"

    def catalogue(self, part: str) -> Path:
        return self.zoo / part / "catalogue.yaml"

    def probes(self, variant: str = "") -> Path:
        return self.zoo / f"probes{variant and '-'}{variant}"

    def signals(self, part: str, variant: str = "") -> Path:
        """Table of a part; `variant`: with other probes than the study's own."""
        return self.root / f"signals{variant and '-'}{variant}" / part / "pairs.parquet"

    def labels(self, part: str) -> Path:
        return self.root / "labels" / part

    def exact(self, part: str) -> Path:
        """Exact features of a sample of plans."""
        return self.root / "exact" / f"{part}.json"

    @property
    def results(self) -> Path:
        """What is published: labels, signals, results.md with figures, and the trained selector."""
        return self.root / "results"

    def parts(self) -> list[str]:
        """Names of the catalogues that have labels, sorted by kind and seed."""
        names = [path.name for path in (self.root / "labels").iterdir() if self.signals(path.name).exists()]
        return sorted(names, key=lambda name: (name[0] != "s", int(name[1:])))


@dataclass(frozen=True)
class LoadedPart:
    """What is known of one base and its experts. signatures: where they lie. signal_seconds: that its table took."""

    name: str
    catalogue: Catalogue
    table: SignalTable
    labels: tuple[LabeledPlan, ...]
    signatures: str
    signal_seconds: float = 0.0


def load_part(layout: StudyLayout, name: str) -> LoadedPart:
    """Read a part; InputError if a file is missing or broken."""
    signals, labels = layout.signals(name), tuple(LabelStore(layout.labels(name)).read())
    table, seconds = read_signal_table(signals), float(read_json(signals.with_suffix(".json"))["seconds"])
    signatures = str(signals.parent / "signatures")
    return LoadedPart(name, load_catalogue(layout.catalogue(name)), table, labels, signatures, seconds)


def probe_variants(probes: Path) -> dict[str, dict[str, bytes]]:
    """Contents of probe files by variant and name: the first 4 and 16 of each task, and those of the next task."""
    names = sorted(path.name for path in probes.glob("*.jsonl"))
    lines = {name: (probes / name).read_bytes().splitlines(keepends=True) for name in names}
    variants = {str(count): {name: b"".join(lines[name][:count]) for name in names} for count in NUM_PROBES_TRIED}
    following = dict(zip(names, [*names[1:], *names[:1]], strict=True))
    return variants | {WRONG_DOMAIN: {name: b"".join(lines[following[name]]) for name in names}}


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
