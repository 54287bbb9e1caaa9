"""The stages of a run. Each reads files, writes files and a manifest, and does nothing when its manifest is current."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from simmerge_ray.base.config import DatasetConfig, SignalsConfig, TrainConfig, load_yaml_leniently
from simmerge_ray.base.errors import ConfigError, InputError, LabelError, ProbeError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import (
    Manifest,
    Output,
    Place,
    check_outputs,
    filled_in_place,
    is_complete,
    name_below,
    write_json,
)
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.checkpoints.probes import GENERAL, ProbeSet, general_probe_set, load_probe_sets
from simmerge_ray.checkpoints.references import read_config
from simmerge_ray.checkpoints.size import model_shape
from simmerge_ray.on_ray.digests import digest_on_nodes
from simmerge_ray.on_ray.resources import only_job
from simmerge_ray.pipelines.dataset import UNCHANGED, input_digests, plan_search, say_twins, search_stage
from simmerge_ray.pipelines.jobs import output_place
from simmerge_ray.plans.keeping import KEEP
from simmerge_ray.search.estimate import SearchEstimate
from simmerge_ray.search.labels import LabelStore
from simmerge_ray.signals.bounds import answer_bounds, bounds, stages_for
from simmerge_ray.signals.candidates.answers import AnswerSpec
from simmerge_ray.signals.candidates.signatures import MAX_MEMBERS, Owner, collect_answers, owners_of
from simmerge_ray.signals.features import FEATURE_SCHEMA
from simmerge_ray.signals.queue import Executor
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore
from simmerge_ray.signals.table import SignalTable, read_signal_table
from simmerge_ray.signals.table_files import digest_table
from simmerge_ray.signals.tokens import tokenize_probes

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
    """Signals of all pairs of a catalogue into the Parquet file `out`; InputError says whatever cannot be used, before
    Ray is started where headers and files show it. probes: directory of probe files; None takes the general probe set
    of the package. signatures: where they are kept; None puts them into `signatures` beside `out`. The members' own
    answers to the probes of their tasks are put there as well, once the table is written."""
    catalogue = load_catalogue(catalogue_path)
    probe_sets = _probe_sets(probes)
    with narrator.stage("signals") as stage:
        for line in _oversights(catalogue, probe_sets):
            narrator.say(f"[yellow]{escape(line)}[/yellow]")
        # The table has the same bits for any number of workers, in memory or layer by layer.
        owners, of_answers = _answering(catalogue, probe_sets, config)
        kept = config.model_dump(exclude={"num_workers", "memory_per_worker"}) | {"answers": bool(owners)}
        digest_on_nodes(catalogue)
        say_twins(catalogue, narrator)
        inputs = input_digests(catalogue, {})
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
        lines = bounds(catalogue, SignatureSpec.of(config), num_batches, config.memory_per_worker, config.weights)
        for line in (*lines, *of_answers):
            narrator.say(f"[dim]{line}[/dim]")

        def answer(executor: Executor) -> None:
            if owners:
                _keep_answers(catalogue, probe_sets, store, executor, config, narrator)

        with narrator.bar("units of work") as report:
            table = compute_signals_on_ray(catalogue, probe_sets, config, report, store, out, answer)
        results = {"num_rows": len(table.rows), "num_features": len(table.columns)}
        manifest.write(out.with_suffix(".json"), time.monotonic() - started, results)
        num = len(catalogue.checkpoints)
        stage.result = (
            f"{num * (num - 1)} ordered pairs of {num} checkpoints x {len(probe_sets)} tasks, "
            f"{len(table.columns)} features each -> {out}"
        )
        return table


def _oversights(catalogue: Catalogue, probe_sets: Mapping[str, ProbeSet]) -> list[str]:
    """What is left out, or of no use, and hardly meant so: tasks without probes."""
    if GENERAL in probe_sets:
        return []
    absent = sorted({task for task in catalogue.own_task.values() if task and task not in probe_sets})
    of = {task: ", ".join(name for name in catalogue.ids if catalogue.own_task[name] == task) for task in absent}
    return [
        f"no probes of {task!r}, the own task of {of[task]}: no signals and no answers on it; write {task}.jsonl, a "
        "`text` a line, beside the others"
        for task in absent
    ]


def _answering(
    catalogue: Catalogue, probe_sets: Mapping[str, ProbeSet], config: SignalsConfig
) -> tuple[list[Owner], list[str]]:
    """Whose answers are kept, and a line for people: how large they are, or why there are none."""
    if not config.answers:
        return [], []
    owners, reason = owners_of(catalogue, tuple(probe_sets)), ""
    if catalogue.base is None:
        reason = "the catalogue names no base"
    elif all(owner.checkpoint == catalogue.base.id for owner in owners):
        reason = "no checkpoint's own task has probes"
    elif len(owners) > MAX_MEMBERS:
        reason = (
            f"each of {len(owners)} members would be run over the answers of all, {MAX_MEMBERS} at most; "
            "`simmerge auto --member` makes those of the members that it is given"
        )
    elif stages_for(catalogue.checkpoints[0], SignatureSpec.of(config), config.memory_per_worker):
        reason = "a checkpoint is run in stages of layers; a worker needs memory for all of them to write answers"
    if reason:
        return [], [f"answers: none, since {reason}"]
    vocabulary = model_shape(read_config(catalogue.checkpoints[0])).vocab_size
    counts = [len(probe_sets[owner.task].probes) for owner in owners]
    return owners, [answer_bounds(counts, len(catalogue.all_refs), vocabulary, AnswerSpec())]


def _keep_answers(
    catalogue: Catalogue,
    probe_sets: Mapping[str, ProbeSet],
    store: SignatureStore,
    executor: Executor,
    config: SignalsConfig,
    narrator: Narrator,
) -> None:
    """Into the signatures. Probes that nobody can answer cost the answers, not the signals."""
    try:
        collect_answers(catalogue, probe_sets, store, executor, signature=SignatureSpec.of(config))
    except ProbeError as error:
        narrator.say(f"[yellow]answers: none, since {escape(str(error))}[/yellow]")


def _probe_sets(probes: Place | None) -> dict[str, ProbeSet]:
    return load_probe_sets(probes) if probes else {GENERAL: general_probe_set()}


def figures_stage(table: SignalTable, out: Place, narrator: Narrator) -> None:
    """Heat maps of the table in the Parquet file `out`, into the directory beside it with `_figures` in its name."""
    directory = out.with_name(f"{out.stem}_figures")
    with narrator.stage("figures") as stage:
        manifest = Manifest("figures", {}, {"signals": digest_table(out)})
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
    """Selector artifact `out` from a signal table and a label store; out-of-fold results as JSON `crossval`. arms: to
    choose from, `keep` for both parents as they are; None takes all.

    Beside the artifact, in `out`: `shortlist`, a second one from the same labels that knows only the features which
    propagator `second_order` delivers (a selector is trained with exactly the features that its scorer will use), and
    `parents.json`, the measured utilities of the checkpoints as they are; and `warm_start.*`, what the arms of a
    service start from.

    Raises:
        InputError: signals and labels that do not fit each other, or too few labels.
    """
    table = read_signal_table(signals)
    store = LabelStore(labels)
    read = store.read()
    if not read:
        raise LabelError(f"no labels at {labels}; `simmerge labels make` makes them")
    with narrator.stage("train") as stage:
        inputs = {"signals": digest_table(signals), "labels": store.digest()}
        manifest = _train_manifest(config, list(arms or ()), inputs)
        if manifest.is_current(out / _MANIFEST) and is_complete(out) and (crossval is None or crossval.exists()):
            stage.result = UNCHANGED
            return
        from simmerge_ray.selector.assessment.crossval import crossval_report
        from simmerge_ray.selector.data.dataset import build_dataset, with_keep

        started = time.monotonic()
        merges, keep = _chosen(arms)
        dataset = build_dataset(table, read, merges)
        dataset = with_keep(dataset) if keep else dataset
        trained = _train(dataset, table, config)
        shown = ""
        if crossval is not None:
            with narrator.bar("checkpoints left out") as report:
                write_json(crossval, content := crossval_report(dataset, config, report))
            shown = f", unseen checkpoints: {_shown_gain(content)}"
        with filled_in_place(out) as directory:
            _write_trained(directory, trained, dataset, read, config)
            manifest.write(directory / _MANIFEST, time.monotonic() - started, {"num_contexts": len(dataset.contexts)})
        stage.result = f"{len(dataset.contexts)} contexts, {len(dataset.arms)} arms{shown} -> {out}"


def train_dataset_stage(
    path: Place, out: Place, config: TrainConfig, narrator: Narrator, arms: Sequence[str] | None = None
) -> None:
    """Selector artifact `out` from a data set of one base or several (`selector.data.files`), with its report: beside
    what `train_stage` writes `assessment.json`, and from it `report.md` and `figures/`; errors and arms as there; None
    takes those that were measured on all pairs, and `keep`."""
    from simmerge_ray.selector.data.files import find_dataset, read_dataset

    files, root, chosen = find_dataset(path), path if path.is_dir() else path.parent, sorted(set(arms or ()))
    with narrator.stage("train") as stage:
        inputs = {f"signals {name_below(table, root)}": digest_table(table) for table in files.signals}
        inputs |= {f"labels {name_below(store, root)}": LabelStore(store).digest() for store in files.labels}
        manifest = _train_manifest(config, chosen, inputs)
        if manifest.is_current(out / _MANIFEST) and is_complete(out) and (out / "report.md").exists():
            stage.result = UNCHANGED
            return
        from simmerge_ray.reports.training import write_selector_report
        from simmerge_ray.selector.assessment.report import assess
        from simmerge_ray.selector.data.dataset import with_keep
        from simmerge_ray.signals.propagation.bound import Bound
        from simmerge_ray.signals.propagation.second_order import SecondOrder

        started = time.monotonic()
        merges, keep = _chosen(chosen)
        loaded = read_dataset(files, merges)
        dataset, table = with_keep(loaded.dataset) if keep else loaded.dataset, loaded.tables[0]
        trained = _train(dataset, table, config)
        columns = {propagator.name: propagator.columns for propagator in (Bound(table), SecondOrder(table))}
        with narrator.bar("splits and ablations") as report:
            content = assess(dataset, config, loaded.base_of, report, columns)
        content["unused"] = list(loaded.unused)
        with filled_in_place(out) as directory:
            _write_trained(directory, trained, dataset, loaded.labels, config)
            write_json(directory / "assessment.json", content)
            report_path = out / write_selector_report(content, directory).name
            manifest.write(directory / _MANIFEST, time.monotonic() - started, {"num_contexts": len(dataset.contexts)})
        headline = content["headline"]
        stage.result = (
            f"{len(dataset.contexts)} contexts, {len(content['bases'])} bases, {len(dataset.arms)} arms, "
            f"{headline}: {_shown_gain(content['splits'][headline])} -> {report_path}"
        )


def _chosen(arms: Sequence[str] | None) -> tuple[list[str] | None, bool]:
    """The merge operators among the arms that were asked for, None for all, and whether a parent may be kept."""
    return [arm for arm in arms or () if arm != KEEP] or None, not arms or KEEP in arms


def _train_manifest(config: TrainConfig, arms: list[str], inputs: Mapping[str, str]) -> Manifest:
    kept = config.model_dump(mode="json") | {"arms": arms, "shortlist": "second_order"}
    return Manifest("train", kept, inputs, _ASSESSMENT_SCHEMA)


def _train(dataset: SelectionDataset, table: SignalTable, config: TrainConfig) -> tuple[Selector, Selector]:
    """The selector, and that of the shortlist."""
    from simmerge_ray.selector.models.train import train_selector
    from simmerge_ray.signals.propagation.second_order import SecondOrder

    restricted = dataset.restricted(SecondOrder(table).columns)
    return train_selector(dataset, config), train_selector(restricted, config)


def _write_trained(
    out: Path,
    trained: tuple[Selector, Selector],
    dataset: SelectionDataset,
    labels: Sequence[LabeledPlan],
    config: TrainConfig,
) -> None:
    """Both, and what the arms of a service start from; for a selector without an encoder there is no such thing."""
    from simmerge_ray.selector.planning.files import write_selectors
    from simmerge_ray.service.bandit.artifact import warm_start_of, write_warm_start

    write_selectors(out, *trained, dataset)
    if (warm := warm_start_of(trained[0], dataset, labels, config)) is not None:
        write_warm_start(out, warm)


def _shown_gain(crossval: dict[str, Any]) -> str:
    if "reason" in crossval:
        return f"not measured ({crossval['reason']})"
    per_merge = crossval["per_merge"]
    return f"GapClosed {per_merge['selector']:.3f}, best fixed {per_merge['best_fixed']:.3f}"


def load_dataset_config(path: Place) -> tuple[DatasetConfig, SearchEstimate]:
    """Read the file of a dataset and check it and all that it names; what its search will take. ConfigError: all
    problems, before anything is computed; OutputError: a submitted job would lose `out`."""
    config, problems = load_yaml_leniently(path, DatasetConfig)
    estimate = None
    if config is not None:
        output_place(config.out, f"`out` in {path}")
        inputs = {"`catalogue`": config.catalogue, "`tasks`": config.tasks, "`probes`": config.probes}
        try:
            check_outputs([Output(config.out, "`out`")], inputs)
        except InputError as error:
            problems.append(str(error))
        try:
            estimate = plan_search(config.catalogue, config.tasks, config.out / "labels", config.search)
        except InputError as error:
            problems += str(error).split("\n")
        try:
            probe_sets = _probe_sets(config.probes)
            tokenize_probes(load_catalogue(config.catalogue), probe_sets, SignatureSpec.of(config.signals))
        except InputError as error:
            if str(error) not in "\n".join(problems):  # the catalogue's problems, a second time
                problems += str(error).split("\n")
    if config is None or estimate is None or problems:
        raise ConfigError("\n  ".join([f"study {path}:", *problems]))
    return config, estimate


def build_dataset_stages(config: DatasetConfig, narrator: Narrator) -> None:
    """Signals, then labels, of one catalogue: the job of `jobs/build_dataset.py`."""
    # Alone in its cluster: another submission of the same job waits, and then finds everything in place.
    with only_job(str(config.out), narrator.say):
        signals = config.out / "signals" / "pairs.parquet"
        signals_stage(config.catalogue, config.probes, signals, config.signals, narrator)
        search_stage(config.catalogue, config.tasks, config.out / "labels", config.search, narrator)
