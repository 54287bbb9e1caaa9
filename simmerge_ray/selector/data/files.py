"""The data set that `simmerge train DATASET` names: labels and signal tables of one base or of several.

    DIR/signals/pairs.parquet        DIR/labels/          one base: `simmerge demo`, `jobs/build_dataset.py`
    DIR/signals/PART/pairs.parquet   DIR/labels/PART/     several, a part for each base and its experts: a study
    DIR/signals/*.parquet            DIR/labels.parquet   several, all labels in one file, which is what is named

The labels of a table are those whose checkpoints are all in it. Signals and labels that have no counterpart are an
error where labels would be lost, and named in `unused` where only signals are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simmerge_ray.base.errors import ConfigError, LabelError, unknown_name
from simmerge_ray.base.storage import Place, list_places
from simmerge_ray.search.labels import LabeledPlan, LabelStore, measures_arm
from simmerge_ray.selector.data.dataset import SelectionDataset, build_dataset, common_arms, join_datasets
from simmerge_ray.signals.table import SignalTable, read_signal_table

_PAIRS = "pairs.parquet"


@dataclass(frozen=True)
class DatasetFiles:
    """signals: tables. labels: stores, or one file of labels."""

    signals: tuple[Place, ...]
    labels: tuple[Place, ...]


@dataclass(frozen=True)
class LoadedDataset:
    """tables: those with labels. base_of: base of each checkpoint. unused: bases that have signals and no labels."""

    labels: tuple[LabeledPlan, ...]
    dataset: SelectionDataset
    tables: tuple[SignalTable, ...]
    base_of: Mapping[str, str]
    unused: tuple[str, ...]


def find_dataset(path: Place) -> DatasetFiles:
    """The files of one of the three forms. Raises ConfigError: there is no such path, or it has none of the forms."""
    if not path.exists():
        raise ConfigError(f"no data set at {path}; `simmerge labels make` or jobs/build_dataset.py makes labels")
    if path.is_dir() and (path / "labels.parquet").is_file():
        path /= "labels.parquet"
    if path.is_file():
        tables = list_places(path.parent / "signals", "*.parquet")
        if path.suffix != ".parquet" or not tables:
            raise ConfigError(f"{path} is no file of labels (Parquet) with tables in {path.parent}/signals/*.parquet")
        return DatasetFiles(tuple(tables), (path,))
    signals, labels = path / "signals", path / "labels"
    if (signals / _PAIRS).is_file() and labels.is_dir():
        return DatasetFiles((signals / _PAIRS,), (labels,))
    parts = sorted((one for one in labels.iterdir() if one.is_dir()), key=str) if labels.is_dir() else []
    if not parts:
        raise ConfigError(
            f"{path} holds no data set: neither signals/{_PAIRS} and labels/, nor signals/PART/{_PAIRS} and "
            "labels/PART/, nor labels.parquet and signals/*.parquet"
        )
    if lacking := [one.name for one in parts if not (signals / one.name / _PAIRS).is_file()]:
        raise LabelError(f"labels of {', '.join(lacking)} have no signals/PART/{_PAIRS} in {path}; compute these first")
    return DatasetFiles(tuple(list_places(signals, f"*/{_PAIRS}")), tuple(parts))


def read_dataset(files: DatasetFiles, arms: Sequence[str] | None = None) -> LoadedDataset:
    """Read labels and signals and join them. arms: labels of the arms to choose from; None takes those that were
    measured on all pairs of all bases. Raises ConfigError: a file that is no signal table. LabelError: no labels,
    labels without signals, tables that do not fit each other, or no arm on all pairs."""
    labels = [label for path in files.labels for label in LabelStore(path).read()]
    if not labels:
        raise LabelError(f"no labels at {files.labels[0]}; `simmerge labels make` makes them")
    tables = [read_signal_table(path) for path in files.signals]
    owner = _owners(tables, files)
    of_table = _labels_by_table(labels, tables, owner, files)
    used = sorted(of_table)
    pair_labels = [label for index in used for label in of_table[index]]
    measured = {arm.label for label in pair_labels if measures_arm(label) and (arm := label.plan.pair_arm)}
    if unknown := [arm for arm in arms or () if arm not in measured]:
        raise LabelError(unknown_name("arm", unknown[0], measured))
    chosen = tuple(arms) if arms else common_arms(pair_labels)
    if not chosen:
        raise LabelError("no arm was measured on all pairs; choose arms with --arm, or search the missing pairs")
    dataset = join_datasets([build_dataset(tables[index], of_table[index], chosen) for index in used])
    names = [_base_name(table, path) for table, path in zip(tables, files.signals, strict=True)]
    base_of = {name: names[index] for name, index in owner.items() if index in of_table}
    unused = tuple(name for index, name in enumerate(names) if index not in of_table)
    return LoadedDataset(tuple(labels), dataset, tuple(tables[index] for index in used), base_of, unused)


def _owners(tables: Sequence[SignalTable], files: DatasetFiles) -> dict[str, int]:
    """The table of each checkpoint."""
    owner: dict[str, int] = {}
    for index, table in enumerate(tables):
        for name in table.checkpoint_ids:
            if owner.setdefault(name, index) != index:
                raise LabelError(
                    f"checkpoint {name!r} is in {files.signals[owner[name]]} and in {files.signals[index]}; ids must "
                    "be unique over the bases"
                )
    return owner


def _labels_by_table(
    labels: Sequence[LabeledPlan], tables: Sequence[SignalTable], owner: Mapping[str, int], files: DatasetFiles
) -> dict[int, list[LabeledPlan]]:
    base_ids = {table.provenance.get("base") for table in tables}
    of_table: dict[int, list[LabeledPlan]] = {}
    unknown: set[str] = set()
    for label in labels:
        members = {name for name in label.plan.members if name not in base_ids}
        owners = {owner[name] for name in members if name in owner}
        unknown |= members - owner.keys()
        if len(owners) > 1 and members <= owner.keys():
            raise LabelError(f"{label.plan.label} merges checkpoints of different signal tables; one table is needed")
        for index in owners:
            of_table.setdefault(index, []).append(label)
    if unknown:
        shown = ", ".join(sorted(unknown)[:4]) + (" ..." if len(unknown) > 4 else "")
        raise LabelError(
            f"labels of {len(unknown)} checkpoints have no signals ({shown}): no table of "
            f"{files.signals[0].parent} names them; compute the signals of their base, or leave the labels out"
        )
    return of_table


def _base_name(table: SignalTable, path: Place) -> str:
    """The id of its base; a table made without one has its own name."""
    name = table.provenance.get("base")
    return str(name) if name is not None else str(path.parent.name if path.name == _PAIRS else path.stem)
