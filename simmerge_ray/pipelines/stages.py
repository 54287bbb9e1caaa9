"""The stages of a run. Each reads files, writes files and a manifest, and does nothing when its manifest is current."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmerge_ray.base.config import DatasetConfig, SignalsConfig, TrainConfig, load_yaml_leniently
from simmerge_ray.base.errors import ConfigError, InputError, LabelError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import Manifest, Place, digest_file, filled_in_place, is_complete, name_below, write_json
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.checkpoints.probes import GENERAL, ProbeSet, general_probe_set, load_probe_sets
from simmerge_ray.on_ray.digests import digest_on_nodes
from simmerge_ray.on_ray.resources import only_job
from simmerge_ray.pipelines.dataset import UNCHANGED, plan_search, search_stage
from simmerge_ray.search.estimate import SearchEstimate
from simmerge_ray.search.labels import LabelStore
from simmerge_ray.search.setup import PreparedSearch
from simmerge_ray.signals.bounds import bounds
from simmerge_ray.signals.compute import tokenize_probes
from simmerge_ray.signals.features import FEATURE_SCHEMA
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore
from simmerge_ray.signals.table import SignalTable, read_signal_table

if TYPE_CHECKING:
    from simmerge_ray.search.labels import LabeledPlan
    from simmerge_ray.selector.data.dataset import SelectionDataset
    from simmerge_ray.selector.models.model import Selector

_MANIFEST = "manifest.json"
_ASSESSMENT_SCHEMA = 3  # changes with what a training writes beside the artifact


def signals_stage(
    catalogue_path: Place,
    probes: Place | None,
    out: Place,
    config: SignalsConfig,
    narrator: Narrator,
    signatures: str | None = None,
) -> SignalTable:
    """Signals of all pairs of a catalogue into the Parquet file `out`.

    Args:
        probes: directory of probe files; None takes the general probe set of the package.
        signatures: where signatures are kept; None puts them into `signatures` beside `out`.

    Raises:
        InputError: whatever cannot be used, before Ray is started where headers and files show it.
    """
    catalogue = load_catalogue(catalogue_path)
    probe_sets = _probe_sets(probes)
    with narrator.stage("signals") as stage:
        # The table has the same bits for any number of workers, in memory or layer by layer.
        kept = config.model_dump(exclude={"num_workers", "memory_per_worker"})
        digest_on_nodes(catalogue)
        inputs = {f"checkpoint {key}": value for key, value in catalogue.digests().items()}
        inputs |= {f"own task {key}": value or "" for key, value in catalogue.own_task.items()}
        inputs |= {f"probes {key}": value.digest for key, value in probe_sets.items()}
        manifest = Manifest("signals", kept, inputs, FEATURE_SCHEMA)
        if manifest.is_current(out.with_suffix(".json")) and out.exists():
            stage.result = UNCHANGED
            return read_signal_table(out)
        from simmerge_ray.on_ray.signal_actors import compute_signals_on_ray

        started = time.monotonic()
        store = SignatureStore(signatures or str(out.parent / "signatures"))
        num_batches = [-(-len(one.probes) // config.batch_size) for one in probe_sets.values()]
        for line in bounds(catalogue, SignatureSpec.of(config), num_batches, config.memory_per_worker).lines():
            narrator.say(f"[dim]{line}[/dim]")
        with narrator.bar("units of work") as report:
            table = compute_signals_on_ray(catalogue, probe_sets, config, report, store)
        table.write(out)
        results = {"num_rows": len(table.rows), "num_features": len(table.columns)}
        manifest.write(out.with_suffix(".json"), time.monotonic() - started, results)
        num = len(catalogue.checkpoints)
        stage.result = (
            f"{num * (num - 1)} ordered pairs of {num} checkpoints x {len(probe_sets)} tasks, "
            f"{len(table.columns)} features each -> {out}"
        )
        return table


def _probe_sets(probes: Place | None) -> dict[str, ProbeSet]:
    return load_probe_sets(probes) if probes else {GENERAL: general_probe_set()}


def figures_stage(table: SignalTable, out: Place, narrator: Narrator) -> None:
    """Heat maps of the table in the Parquet file `out`, into the directory beside it with `_figures` in its name."""
    directory = out.with_name(f"{out.stem}_figures")
    with narrator.stage("figures") as stage:
        manifest = Manifest("figures", {}, {"signals": digest_file(out)})
        if manifest.is_current(directory / "figures.json"):
            stage.result = UNCHANGED
            return
        from simmerge_ray.reports.figures import write_heat_maps

        started = time.monotonic()
        paths = write_heat_maps(table, directory)
        manifest.write(directory / "figures.json", time.monotonic() - started, {"files": [path.name for path in paths]})
        stage.result = f"{len(paths)} heat maps -> {directory}"


def train_stage(
    signals: Place,
    labels: Place,
    out: Place,
    config: TrainConfig,
    narrator: Narrator,
    arms: Sequence[str] | None = None,
    crossval: Place | None = None,
) -> None:
    """Selector artifact `out` from a signal table and a label store; out-of-fold results as JSON `crossval`.

    Beside the artifact, in `out`: `shortlist`, a second one from the same labels that knows only the features which
    propagator `second_order` delivers (a selector is trained with exactly the features that its scorer will use), and
    `parents.json`, the measured utilities of the checkpoints as they are; and `warm_start.*`, what the arms of a
    service start from.

    Raises:
        InputError: signals and labels that do not fit each other, or too few labels.
    """
    from simmerge_ray.signals.table import read_signal_table

    table = read_signal_table(signals)
    store = LabelStore(labels)
    read = store.read()
    if not read:
        raise LabelError(f"no labels at {labels}; `simmerge search` makes them")
    with narrator.stage("train") as stage:
        inputs = {"signals": digest_file(signals), "labels": store.digest()}
        kept = config.model_dump(mode="json") | {"arms": list(arms or ()), "shortlist": "second_order"}
        manifest = Manifest("train", kept, inputs, _ASSESSMENT_SCHEMA)
        if manifest.is_current(out / _MANIFEST) and is_complete(out) and (crossval is None or crossval.exists()):
            stage.result = UNCHANGED
            return
        from simmerge_ray.selector.assessment.crossval import crossval_report
        from simmerge_ray.selector.data.dataset import build_dataset
        from simmerge_ray.selector.models.train import train_selector
        from simmerge_ray.selector.planning.files import write_selectors
        from simmerge_ray.signals.propagation.second_order import SecondOrder

        started = time.monotonic()
        dataset = build_dataset(table, read, arms)
        selector = train_selector(dataset, config)
        shortlist = train_selector(dataset.restricted(SecondOrder(table).columns), config)
        shown = ""
        if crossval is not None:
            with narrator.bar("checkpoints left out") as report:
                content = crossval_report(dataset, config, report)
            write_json(crossval, content)
            shown = f", unseen checkpoints: {_shown_gain(content)}"
        with filled_in_place(out) as directory:
            write_selectors(directory, selector, shortlist, dataset)
            _write_warm_start(directory, selector, dataset, read, config)
            manifest.write(directory / _MANIFEST, time.monotonic() - started, {"num_contexts": len(dataset.contexts)})
        stage.result = f"{len(dataset.contexts)} contexts, {len(dataset.arms)} arms{shown} -> {out}"


def train_dataset_stage(
    path: Place, out: Place, config: TrainConfig, narrator: Narrator, arms: Sequence[str] | None = None
) -> None:
    """Selector artifact `out` from a data set of one base or several (`selector.files`), with its report.

    Beside what `train_stage` writes: `assessment.json`, and from it `report.md` and `figures/`.

    Args:
        arms: reference arms; None takes those that were measured on all pairs.

    Raises:
        InputError: no data set, signals and labels that do not fit each other, or too few labels.
    """
    from simmerge_ray.selector.data.files import find_dataset, read_dataset

    files = find_dataset(path)
    with narrator.stage("train") as stage:
        inputs = {f"signals {name_below(one, _root(path))}": digest_file(one) for one in files.signals}
        inputs |= {f"labels {name_below(one, _root(path))}": LabelStore(one).digest() for one in files.labels}
        kept = config.model_dump(mode="json") | {"arms": sorted(set(arms or ())), "shortlist": "second_order"}
        manifest = Manifest("train", kept, inputs, _ASSESSMENT_SCHEMA)
        if manifest.is_current(out / _MANIFEST) and is_complete(out) and (out / "report.md").exists():
            stage.result = UNCHANGED
            return
        from simmerge_ray.reports.training import write_selector_report
        from simmerge_ray.selector.assessment.report import assess
        from simmerge_ray.selector.models.train import train_selector
        from simmerge_ray.selector.planning.files import write_selectors
        from simmerge_ray.signals.propagation.bound import Bound
        from simmerge_ray.signals.propagation.second_order import SecondOrder

        started = time.monotonic()
        loaded = read_dataset(files, sorted(set(arms or ())) or None)
        dataset, table = loaded.dataset, loaded.tables[0]
        selector = train_selector(dataset, config)
        columns = {one.name: one.columns for one in (Bound(table), SecondOrder(table))}
        shortlist = train_selector(dataset.restricted(columns[SecondOrder.name]), config)
        with narrator.bar("splits and ablations") as report:
            content = assess(dataset, config, loaded.base_of, report, columns)
        content["unused"] = list(loaded.unused)
        with filled_in_place(out) as directory:
            write_selectors(directory, selector, shortlist, dataset)
            _write_warm_start(directory, selector, dataset, loaded.labels, config)
            write_json(directory / "assessment.json", content)
            report_path = out / write_selector_report(content, directory).name
            manifest.write(directory / _MANIFEST, time.monotonic() - started, {"num_contexts": len(dataset.contexts)})
        main = content["splits"][content["headline"]]
        stage.result = (
            f"{len(dataset.contexts)} contexts, {len(content['bases'])} bases, {len(dataset.arms)} arms, "
            f"{content['headline']}: {_shown_gain(main)} -> {report_path}"
        )


def _write_warm_start(
    out: Path, selector: Selector, dataset: SelectionDataset, labels: Sequence[LabeledPlan], config: TrainConfig
) -> None:
    """What the arms of a service start from; nothing for a selector that has no encoder."""
    from simmerge_ray.service.bandit.artifact import warm_start_of, write_warm_start

    warm = warm_start_of(selector, dataset, labels, config)
    if warm is not None:
        write_warm_start(out, warm)


def _root(path: Place) -> Place:
    return path if path.is_dir() else path.parent


def _shown_gain(crossval: dict[str, Any]) -> str:
    if "reason" in crossval:
        return f"not measured ({crossval['reason']})"
    per_merge = crossval["per_merge"]
    return f"GapClosed {per_merge['selector']:.3f}, best fixed {per_merge['best_fixed']:.3f}"


def check_dataset_config(config: DatasetConfig) -> tuple[PreparedSearch, SearchEstimate]:
    """Read and check every input of a dataset; what its search will take.

    Raises:
        ConfigError: with the problems of all inputs, before anything is computed.
    """

    problems: dict[str, None] = {}
    planned = None
    try:
        planned = plan_search(config.catalogue, config.tasks, config.out / "labels", config.search)
    except InputError as error:
        problems[str(error)] = None
    try:
        probe_sets = _probe_sets(config.probes)
        tokenize_probes(load_catalogue(config.catalogue), probe_sets, SignatureSpec.of(config.signals))
    except InputError as error:
        if str(error) not in "".join(problems):  # the catalogue's problems, a second time
            problems[str(error)] = None
    if planned is None or problems:
        raise ConfigError("\n".join(problems))
    return planned


def load_dataset_config(path: Place) -> tuple[DatasetConfig, PreparedSearch, SearchEstimate]:
    """Read the file of a dataset and check it and everything that it names.

    Raises:
        ConfigError: with all problems, of the file and of what it names.
    """
    config, problems = load_yaml_leniently(path, DatasetConfig)
    planned = None
    if config is not None:
        try:
            planned = check_dataset_config(config)
        except ConfigError as error:
            problems += str(error).split("\n")
    if config is None or planned is None or problems:
        raise ConfigError("\n  ".join([f"study {path}:", *problems]))
    return config, *planned


def build_dataset_stages(config: DatasetConfig, narrator: Narrator) -> Place:
    """Signals, then labels, of one catalogue: the job of `jobs/build_dataset.py`. Returns the output directory."""
    # Alone in its cluster: another submission of the same job waits, and then finds everything in place.
    with only_job(str(config.out), narrator.say) if "RAY_ADDRESS" in os.environ else nullcontext():
        signals = config.out / "signals" / "pairs.parquet"
        signals_stage(config.catalogue, config.probes, signals, config.signals, narrator)
        search_stage(config.catalogue, config.tasks, config.out / "labels", config.search, narrator)
    return config.out
