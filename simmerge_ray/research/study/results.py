"""The sections of the study's results, each kept in a file so that an interrupted analysis goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import InputError, LabelError
from simmerge_ray.base.storage import Manifest, digest_file, digest_json, read_json, write_json
from simmerge_ray.research.study.analysis import (
    ARMS,
    bases_of,
    bought,
    joined,
    longer,
    new_operators,
    propagators,
    subset_choice,
    to_larger_base,
    with_probes,
)
from simmerge_ray.research.study.exact_sample import RecordedExact, sampled_part
from simmerge_ray.research.study.headline import primary_test
from simmerge_ray.research.study.layout import LoadedPart, StudyLayout, load_part
from simmerge_ray.research.study.longer import measured_merges, unmerged_utilities
from simmerge_ray.research.study.subset_choice import labelled_choices
from simmerge_ray.research.study.unseen_base import longer_plans
from simmerge_ray.selector.data.dataset import SelectionDataset

_SCHEMA = 1
_FULL = 6  # checkpoints of the catalogue of which every subset is labelled
PROBE_VARIANTS = ("4", "16", "wrong")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class StudyData:
    """What is labelled of a study. small: the bases of the demo's size. large: the larger base, or nothing."""

    layout: StudyLayout
    small: tuple[LoadedPart, ...]
    large: tuple[LoadedPart, ...]
    config: TrainConfig

    @staticmethod
    def load(layout: StudyLayout, config: TrainConfig) -> StudyData:
        """Read every base that has signals and labels.

        Raises:
            InputError: a file is missing or broken.
        """
        parts = [load_part(layout, name) for name in layout.parts()]
        small, large = ([part for part in parts if (part.name[0] == "s") is wanted] for wanted in (True, False))
        return StudyData(layout, tuple(small), tuple(large), config)

    @cached_property
    def dataset(self) -> SelectionDataset:
        """The pairs of the small bases."""
        return joined(self.small, ARMS)

    @property
    def base_of(self) -> dict[str, str]:
        """The base of every checkpoint of the small bases."""
        return bases_of(self.small)

    def inputs(self) -> dict[str, str]:
        """Digests of everything that a section depends on."""
        found = {}
        for part in (*self.small, *self.large):
            found[f"labels {part.name}"] = digest_json(sorted((one.key, one.seconds) for one in part.labels))
            for variant in ("", *PROBE_VARIANTS):
                path = self.layout.signals(part.name, variant)
                if path.exists():
                    found[f"signals {part.name} {variant}".strip()] = digest_file(path)
            if self.layout.exact(part.name).exists():
                found[f"exact {part.name}"] = digest_file(self.layout.exact(part.name))
        return found


def _counts(data: StudyData) -> dict[str, Any]:
    """What was trained and labelled."""
    rows = []
    for part in (*data.small, *data.large):
        merges = measured_merges(part.labels, part.catalogue)
        sizes = [len(plan.members) for plan in merges]
        rows.append(
            {
                "base": part.name,
                "checkpoints": len(part.catalogue.ids),
                "merges": {str(size): sizes.count(size) for size in sorted(set(sizes))},
                "labels": len(part.labels),
                "seconds": sum(label.seconds for label in part.labels),
                "utilities": unmerged_utilities(part.labels),
            }
        )
    return {"rows": rows}


def _probes(data: StudyData) -> list[dict[str, Any]]:
    """The primary test with the signals of fewer probes, and of those of another domain."""
    rows = [{"probes": "64, the study's"} | _gain(primary_test(data.dataset, data.base_of, data.config))]
    for variant in PROBE_VARIANTS:
        if all(data.layout.signals(part.name, variant).exists() for part in data.small):
            dataset = joined(with_probes(data.small, data.layout, variant), ARMS)
            rows.append({"probes": variant} | _gain(primary_test(dataset, data.base_of, data.config)))
    return rows


def _gain(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("gain", "interval")}


def _subsets(data: StudyData) -> list[dict[str, Any]]:
    part = data.small[0]
    merges = measured_merges(part.labels, part.catalogue)
    for members in sorted({tuple(sorted(plan.members)) for plan in merges if len(plan.members) == _FULL}):
        try:
            labelled_choices(part.labels, part.catalogue, members, ARMS)
        except LabelError:  # a six-way subset of the longer plans: its pairs are not all labelled
            continue
        rows: list[dict[str, Any]] = subset_choice(part, members, data.dataset, data.config)
        return rows
    raise InputError(f"no catalogue of six of {part.name} has labels of all of its subsets")


def _exact(data: StudyData) -> dict[str, Any]:
    """The longer plans' comparison on the sample that has exact features, for each propagator."""
    known = [part for part in data.small if data.layout.exact(part.name).exists()]
    if not known:
        raise InputError("no exact features; `jobs/study.py --stage exact` makes them")
    made = {
        **propagators(),
        "exact": lambda part: RecordedExact(part.table, data.layout.exact(part.name)),
    }
    parts = [sampled_part(part) for part in known]
    return longer_plans(parts, data.dataset, bases_of(data.small), data.config, made)


def _transfer(data: StudyData) -> dict[str, Any]:
    if not data.large:
        raise InputError("the larger base has no labels")
    return to_larger_base(data.small, data.large, data.config)


SECTIONS: Mapping[str, Callable[[StudyData], Any]] = {
    "counts": _counts,
    "primary": lambda data: primary_test(data.dataset, data.base_of, data.config),
    "longer": lambda data: longer(data.small, data.dataset, data.config),
    "exact": _exact,
    "subsets": _subsets,
    "transfer": _transfer,
    "probes": _probes,
    "later": lambda data: new_operators(data.small, data.base_of, data.config),
    "evaluations": lambda data: bought(data.small, data.dataset, data.base_of, data.config),
}


def analyse(data: StudyData, directory: Path, tell: Tell, names: Sequence[str] = tuple(SECTIONS)) -> dict[str, Any]:
    """Compute the sections, each into `directory/<name>.json`; what is current is read. A section that cannot be
    computed has a `reason` instead.

    Raises:
        InputError: there are no labels.
    """
    inputs, found = data.inputs(), {}
    kept = data.config.model_dump(mode="json")
    for name in names:
        manifest, path = Manifest(name, kept, inputs, _SCHEMA), directory / f"{name}.json"
        manifest_path = directory / f"{name}.manifest.json"
        if path.exists() and manifest.is_current(manifest_path):
            found[name] = read_json(path)
            continue
        started = time.monotonic()
        try:
            found[name] = SECTIONS[name](data)
        except InputError as error:
            found[name] = {"reason": str(error)}
        write_json(path, found[name])
        manifest.write(manifest_path, time.monotonic() - started, {})
        tell(f"{name}: {time.monotonic() - started:.0f} s")
    return found
