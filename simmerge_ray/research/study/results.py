"""The sections of the study's results, each kept in a file so that an interrupted analysis goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import InputError, LabelError
from simmerge_ray.base.storage import Manifest, digest_file, digest_json, read_json, write_json
from simmerge_ray.research.study import analysis
from simmerge_ray.research.study.analysis import ARMS, PropagatorMaker, bases_of, joined
from simmerge_ray.research.study.exact_sample import RecordedExact, sampled_part
from simmerge_ray.research.study.headline import primary_test
from simmerge_ray.research.study.later_arm import later_arm
from simmerge_ray.research.study.layout import PROBE_VARIANTS, LoadedPart, StudyLayout, load_part
from simmerge_ray.research.study.longer import measured_merges, unmerged_utilities
from simmerge_ray.research.study.merges import CONTROL_ARM, LATER_ARM
from simmerge_ray.research.study.subset_choice import labelled_choices
from simmerge_ray.research.study.transfer import transfer
from simmerge_ray.research.study.unseen_base import longer_plans
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.splits import base_folds, pairs_of
from simmerge_ray.signals.table import read_signal_table

_SCHEMA = 1
_FULL = 6  # checkpoints of the catalogue of which every subset is labelled


@dataclass(frozen=True)
class StudyData:
    """What is labelled of a study. small: the bases of the demo's size. large: the larger base, or nothing."""

    layout: StudyLayout
    small: tuple[LoadedPart, ...]
    large: tuple[LoadedPart, ...]
    config: TrainConfig

    @staticmethod
    def load(layout: StudyLayout, config: TrainConfig) -> StudyData:
        """Read every base that has signals and labels; InputError where a file is missing or broken."""
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
            files = {f"exact {part.name}": self.layout.exact(part.name)}
            for variant in ("", *PROBE_VARIANTS):
                files[f"signals {part.name} {variant}".strip()] = self.layout.signals(part.name, variant)
            found |= {name: digest_file(path) for name, path in files.items() if path.exists()}
        return found


def _counts(data: StudyData) -> dict[str, Any]:
    """What was trained and labelled."""
    rows = []
    for part in (*data.small, *data.large):
        merges = measured_merges(part.labels, part.catalogue)
        sizes = [len(plan.members) for plan in merges]
        by_size = {str(size): sizes.count(size) for size in sorted(set(sizes))}
        row = {"base": part.name, "checkpoints": len(part.catalogue.ids), "merges": by_size, "labels": len(part.labels)}
        seconds = sum(label.seconds for label in part.labels)
        rows.append(row | {"seconds": seconds, "utilities": unmerged_utilities(part.labels)})
    return {"rows": rows}


def _longer(data: StudyData, parts: Sequence[LoadedPart] | None = None, **more: PropagatorMaker) -> dict[str, Any]:
    """`longer_plans` with the propagators that need no probes, and more."""
    return longer_plans(parts or data.small, data.dataset, data.base_of, data.config, analysis.propagators() | more)


def _probes(data: StudyData) -> list[dict[str, Any]]:
    """The primary test with the signals of fewer probes, and of those of another domain."""
    datasets = {"64, the study's": data.dataset}
    for variant in PROBE_VARIANTS:
        if all(data.layout.signals(part.name, variant).exists() for part in data.small):
            tables = {part.name: read_signal_table(data.layout.signals(part.name, variant)) for part in data.small}
            datasets[variant] = joined([replace(part, table=tables[part.name]) for part in data.small], ARMS)
    tests = {name: primary_test(dataset, data.base_of, data.config) for name, dataset in datasets.items()}
    return [{"probes": name, "gain": test["gain"], "interval": test["interval"]} for name, test in tests.items()]


def fully_labelled(part: LoadedPart) -> tuple[str, ...]:
    """The catalogue of six of which every subset is labelled. Raises InputError: there is none."""
    merges = measured_merges(part.labels, part.catalogue)
    for members in sorted({tuple(sorted(plan.members)) for plan in merges if len(plan.members) == _FULL}):
        try:
            labelled_choices(part.labels, part.catalogue, members, ARMS)
        except LabelError:  # a six-way subset of the longer plans: its pairs are not all labelled
            continue
        return members
    raise InputError(f"no catalogue of six of {part.name} has labels of all of its subsets")


def _subsets(data: StudyData) -> list[dict[str, Any]]:
    part = data.small[0]
    rows: list[dict[str, Any]] = analysis.subset_choice(part, fully_labelled(part), data.dataset, data.config)
    return rows


def _exact(data: StudyData) -> dict[str, Any]:
    """The longer plans' comparison on the sample that has exact features, for each propagator."""
    known = [part for part in data.small if data.layout.exact(part.name).exists()]
    if not known:
        raise InputError("no exact features; `jobs/study.py --stage exact` makes them")
    recorded = {"exact": lambda part: RecordedExact(part.table, data.layout.exact(part.name))}
    return _longer(data, [sampled_part(part) for part in known], **recorded)


def _transfer(data: StudyData) -> dict[str, Any]:
    if not data.large:
        raise InputError("the larger base has no labels")
    base_of = bases_of([*data.small, *data.large])
    return transfer(joined(data.small, ARMS), joined(data.large, ARMS), data.config, base_of)


def _new_operators(data: StudyData) -> dict[str, list[dict[str, Any]]]:
    """`later_arm` on unseen bases for the study's later arm, and, which was not planned, for the control arm."""
    found = {}
    for arm in (LATER_ARM.label, CONTROL_ARM.label):
        dataset = joined(data.small, (*ARMS, arm))
        folds = base_folds(pairs_of(dataset.contexts), data.base_of)
        found[arm] = later_arm(dataset, arm, folds, data.config, data.base_of)
    return found


SECTIONS: Mapping[str, Callable[[StudyData], Any]] = {
    "counts": _counts,
    "primary": lambda data: primary_test(data.dataset, data.base_of, data.config),
    "longer": _longer,
    "exact": _exact,
    "subsets": _subsets,
    "transfer": _transfer,
    "probes": _probes,
    "later": _new_operators,
    "evaluations": lambda data: analysis.bought(data.small, data.dataset, data.base_of, data.config),
}


def analyse(data: StudyData, directory: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Compute the sections, each into `directory/<name>.json`; what is current is read. A section that cannot be
    computed has a `reason` instead."""
    inputs, kept, found = data.inputs(), data.config.model_dump(mode="json"), {}
    for name, section in SECTIONS.items():
        manifest, path = Manifest(name, kept, inputs, _SCHEMA), directory / f"{name}.json"
        manifest_path = directory / f"{name}.manifest.json"
        if path.exists() and manifest.is_current(manifest_path):
            found[name] = read_json(path)
            continue
        started = time.monotonic()
        try:
            found[name] = section(data)
        except InputError as error:
            found[name] = {"reason": str(error)}
        write_json(path, found[name])
        manifest.write(manifest_path, time.monotonic() - started, {})
        tell(f"{name}: {time.monotonic() - started:.0f} s")
    return found
