"""What `docs/study.md` says, computed again from the labels and signals that are published beside it.

Signatures, exact features and the signals of other probes are not published (they are larger than the repository), so
what rests on them, the propagator `virtual` above all, is no section here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.storage import digest_file
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.research.study.analysis import ALL_ARMS, ARMS, bought, joined
from simmerge_ray.research.study.headline import primary_test
from simmerge_ray.research.study.layout import LoadedPart, StudyLayout
from simmerge_ray.research.study.longer import unmerged_utilities
from simmerge_ray.research.study.merges import LATER_ARM
from simmerge_ray.research.study.results import SECTIONS as STUDY_SECTIONS
from simmerge_ray.research.study.results import StudyData, fully_labelled
from simmerge_ray.research.study.subset_choice import compare_subsets, labelled_choices
from simmerge_ray.research.study.unseen_base import longer_plans
from simmerge_ray.search.headroom import headroom
from simmerge_ray.search.labels import LabelStore
from simmerge_ray.selector.assessment.report import assess
from simmerge_ray.selector.data.dataset import SelectionDataset
from simmerge_ray.selector.data.scoring import Scoring
from simmerge_ray.signals.propagation.bound import Bound
from simmerge_ray.signals.propagation.second_order import SecondOrder
from simmerge_ray.signals.table import SignalTable, read_signal_table

_PAPER = ("linear", "nuslerp", "ties")
ARM_SETS: Mapping[str, tuple[str, ...]] = {
    "the paper's kinds": _PAPER,
    "these and task_arithmetic": (*_PAPER, LATER_ARM.label),
    "the study's and task_arithmetic": (*ARMS, LATER_ARM.label),
    "all six": ALL_ARMS,
}


@dataclass(frozen=True)
class PublishedStudy:
    """The directory `docs/study`: labels and signals of the small bases, and of the larger one in `large/`."""

    root: Path
    config: TrainConfig = TrainConfig()

    def inputs(self) -> dict[str, str]:
        """Digests of the files, by their place."""
        return {str(path.relative_to(self.root)): digest_file(path) for path in sorted(self.root.rglob("*.parquet"))}

    @cached_property
    def data(self) -> StudyData:
        """As the study's own analysis has them. Raises LabelError, ConfigError: a file is missing or broken."""
        small, large = (_parts(directory) for directory in (self.root, self.root / "large"))
        return StudyData(StudyLayout(self.root), small, large, self.config)


def _parts(directory: Path) -> tuple[LoadedPart, ...]:
    labels = LabelStore(directory / "labels.parquet").read()
    found = []
    for path in sorted(directory.glob("signals/*.parquet"), key=lambda path: int(path.stem[1:])):
        table = read_signal_table(path)
        catalogue = _catalogue(table)
        names = {ref.id for ref in catalogue.all_refs}
        own = tuple(label for label in labels if set(label.plan.members) <= names)
        found.append(LoadedPart(path.stem, catalogue, table, own, signatures=""))
    return tuple(found)


def _catalogue(table: SignalTable) -> Catalogue:
    """What a table says of its checkpoints; they lie nowhere."""
    base = CheckpointRef(str(table.provenance["base"]), Path())
    refs = tuple(CheckpointRef(name, Path(), base.id) for name in table.checkpoint_ids)
    return Catalogue(refs, table.provenance["own_task"], base)


def _arm_sets(published: PublishedStudy) -> dict[str, Any]:
    """The primary test with other arms to choose from, and how much there is to choose."""
    data, found = published.data, {"the study's": _room(published.data.dataset)}
    for name, arms in ARM_SETS.items():
        dataset = joined(data.small, arms)
        test = primary_test(dataset, data.base_of, data.config)
        found[name] = _room(dataset) | {key: test[key] for key in ("gain", "interval")}
    return found


def _room(dataset: SelectionDataset) -> dict[str, Any]:
    room, scoring = headroom(dataset.contexts), Scoring.of(dataset.contexts, dataset.arms)
    best, fixed = scoring.best_fixed(), scoring.fixed()
    return {
        "best_fixed": dataset.arms[best],
        "gap_closed": float(fixed[best]),
        "arms": dict(zip(dataset.arms, fixed.tolist(), strict=False)),
        "per_merge": {"gain": room.per_merge.gain, "interval": room.per_merge.gain_interval},
        "per_context": room.per_context.gain,
    }


def _controls(published: PublishedStudy) -> dict[str, Any]:
    """Of the report of `simmerge train` on the study's arms, what the page shows."""
    data = published.data
    table = data.small[0].table
    columns = {one.name: one.columns for one in (Bound(table), SecondOrder(table))}
    found = assess(joined(data.small, sorted(ARMS)), data.config, data.base_of, None, columns, brief=True)
    return {key: found[key] for key in ("splits", "ablations", "headline")}


def _unseen_bases(published: PublishedStudy) -> dict[str, Any]:
    """What rests on the same networks, which are trained once."""
    data = published.data
    evaluations = bought(data.small, data.dataset, data.base_of, data.config)
    return {name: STUDY_SECTIONS[name](data) for name in ("primary", "later")} | {"evaluations": evaluations}


def _longer(published: PublishedStudy) -> dict[str, Any]:
    """The longer plans by the propagators that need no more than the table."""
    data = published.data
    makers = {"bound": lambda part: Bound(part.table), "second_order": lambda part: SecondOrder(part.table)}
    return longer_plans(data.small, data.dataset, data.base_of, data.config, makers)


def _subsets(published: PublishedStudy) -> list[dict[str, Any]]:
    """The rules that need no predictions."""
    part, dataset = published.data.small[0], published.data.dataset
    choices = labelled_choices(part.labels, part.catalogue, fully_labelled(part), ARMS)
    others = [row for row, context in enumerate(dataset.contexts) if context.left not in part.catalogue.ids]
    fixed = dataset.arms[Scoring.of(dataset.contexts, dataset.arms).among(others).best_fixed()]
    utilities, nothing = unmerged_utilities(part.labels), {choice.plan.id: 0.0 for choice in choices}
    rows = compare_subsets(choices, nothing, fixed, part.table, utilities, part.catalogue)
    return [row for row in rows if "predicted" not in row["policy"]]


# The longest first, so that two processes end at about the same time.
SECTIONS: Mapping[str, Callable[[PublishedStudy], Any]] = {
    "controls": _controls,
    "unseen bases": _unseen_bases,
    "arm sets": _arm_sets,
    "longer": _longer,
    "transfer": lambda published: STUDY_SECTIONS["transfer"](published.data),
    "subsets": _subsets,
    "counts": lambda published: STUDY_SECTIONS["counts"](published.data),
}
