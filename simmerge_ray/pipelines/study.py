"""The stages of the study on Ray: its zoo, signals of every base, labels of pairs and longer plans, and the analysis.

Every stage keeps what is there, so an interrupted study goes on with the same command. Labels of each base lie in a
store of their own, and are folded into one file when its stage is complete.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from simmerge_ray.base.config import SearchConfig, StudyConfig, TrainConfig
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import Manifest, digest_json, write_atomically
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.on_ray.resources import ray_session
from simmerge_ray.on_ray.tasks import run_tasks
from simmerge_ray.pipelines.dataset import UNCHANGED, search_bar
from simmerge_ray.pipelines.demo import SIGNALS
from simmerge_ray.pipelines.stages import signals_stage, train_dataset_stage
from simmerge_ray.pipelines.zoo import make_zoo_parts, write_questions
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.research.study.analysis import ALL_ARMS, ARMS
from simmerge_ray.research.study.exact_sample import write_exact
from simmerge_ray.research.study.layout import StudyLayout, load_part
from simmerge_ray.research.study.longer import unmerged_utilities
from simmerge_ray.research.study.merges import draw_subsets, every_subset, labelled_pairs, plans_of
from simmerge_ray.research.study.page import write_results
from simmerge_ray.research.study.publish import export_dataset
from simmerge_ray.research.study.results import StudyData, analyse
from simmerge_ray.research.study.zoo import ZooPart, zoo_part
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.search.labels import LabelStore

STAGES = ("zoo", "signals", "pairs", "plans", "probes", "exact", "analysis")
NUM_PROBES_TRIED = (4, 16)  # beside all of them
WRONG_DOMAIN = "wrong"
FULL_PLANS = 4  # of every subset of the fully labelled catalogue
FIRST_SEED = 1  # seed 0 is the demo's, which was looked at while the selector was built


def study_parts(config: StudyConfig) -> list[ZooPart]:
    """The catalogues of a study: one for each base, the large one last."""
    seeds = range(FIRST_SEED, FIRST_SEED + config.num_bases)
    parts = [zoo_part(seed, config.num_per_domain, step_share=config.step_share) for seed in seeds]
    if config.num_large_per_domain:
        parts.append(zoo_part(FIRST_SEED, config.num_large_per_domain, large=True, step_share=config.step_share))
    return parts


def run_study(root: Path, config: StudyConfig, narrator: Narrator, stages: Sequence[str] = STAGES) -> None:
    """Run stages of a study in `root`; what is current is not computed again.

    Raises:
        SimmergeError: a stage failed; the next call goes on from there.
    """
    layout, parts = StudyLayout(root.resolve()), study_parts(config)
    chosen = [stage for stage in STAGES if stage in stages]
    with ray_session() if set(chosen) - {"analysis"} else nullcontext():
        for stage in chosen:
            _RUN[stage](layout, config, parts, narrator)


def _zoo(layout: StudyLayout, config: StudyConfig, parts: Sequence[ZooPart], narrator: Narrator) -> None:
    with narrator.stage("zoo") as stage, narrator.status_bar("checkpoints trained") as report:
        write_questions(layout.zoo, config.num_items, config.num_probes)
        num_trained = make_zoo_parts(layout.zoo, parts, lambda done, total: report(done, total, ""))
        num_all = sum(1 + len(part.experts) for part in parts)
        stage.result = f"{num_trained} checkpoints trained, {num_all} in all -> {layout.zoo}"


def _signals(layout: StudyLayout, config: StudyConfig, parts: Sequence[ZooPart], narrator: Narrator) -> None:
    for part in parts:
        signals_stage(layout.catalogue(part.name), layout.probes(), layout.signals(part.name), SIGNALS, narrator)


def _probes(layout: StudyLayout, config: StudyConfig, parts: Sequence[ZooPart], narrator: Narrator) -> None:
    """Signals from fewer probes, and from those of another domain: what the final gain owes to them."""
    for variant, files in probe_variants(layout.probes()).items():
        for name, data in files.items():
            write_atomically(layout.probes(variant) / name, data)
        for part in parts:
            out = layout.signals(part.name, variant)
            signals_stage(layout.catalogue(part.name), layout.probes(variant), out, SIGNALS, narrator)


def probe_variants(probes: Path) -> dict[str, dict[str, bytes]]:
    """Contents of probe files by variant and name: the first 4 and 16 of each task, and those of the next task."""
    names = sorted(path.name for path in probes.glob("*.jsonl"))
    lines = {name: (probes / name).read_bytes().splitlines(keepends=True) for name in names}
    found = {str(count): {name: b"".join(lines[name][:count]) for name in names} for count in NUM_PROBES_TRIED}
    following = dict(zip(names, [*names[1:], *names[:1]], strict=True))
    return found | {WRONG_DOMAIN: {name: b"".join(lines[following[name]]) for name in names}}


def _pairs(layout: StudyLayout, config: StudyConfig, parts: Sequence[ZooPart], narrator: Narrator) -> None:
    for part in parts:
        catalogue = load_catalogue(layout.catalogue(part.name))
        singles = [MergePlan(source=ref.id) for ref in catalogue.all_refs]
        _label("pairs", layout, config, part, [*singles, *labelled_pairs(catalogue)], narrator)


def _plans(layout: StudyLayout, config: StudyConfig, parts: Sequence[ZooPart], narrator: Narrator) -> None:
    for number, part in enumerate(parts):
        _label("plans", layout, config, part, list(_longer_plans(layout, config, part, number == 0)), narrator)


def _longer_plans(layout: StudyLayout, config: StudyConfig, part: ZooPart, with_full: bool) -> Iterator[MergePlan]:
    catalogue = load_catalogue(layout.catalogue(part.name))
    utilities = unmerged_utilities(LabelStore(layout.labels(part.name)).read())
    seed = part.base.seed
    for size, num in sorted(config.num_subsets.items()):
        for subset in draw_subsets(catalogue, size, num, seed):
            yield from plans_of(subset, catalogue, utilities, config.num_orders, config.num_mixed, seed)
    if with_full and config.num_full:
        ids = sorted(catalogue.ids)
        members = ids[:: max(1, len(ids) // config.num_full)][: config.num_full]
        yield from every_subset(members, FULL_PLANS, seed)


def _exact(layout: StudyLayout, config: StudyConfig, parts: Sequence[ZooPart], narrator: Narrator) -> None:
    """Exact features of a sample of three-way plans, a file for each small base; a task for each, one CPU."""
    wanted = [part.name for part in parts if part.name[0] == "s" and not layout.exact(part.name).exists()]
    with narrator.stage("exact") as stage, narrator.bar("bases") as report:
        calls = deque((layout.root, name) for name in wanted)
        for done, _ in enumerate(run_tasks(_exact_features, calls), 1):
            report(done, len(wanted))
        stage.result = f"{len(wanted)} bases -> {layout.root / 'exact'}" if wanted else UNCHANGED


def _exact_features(root: Path, name: str) -> int:
    layout = StudyLayout(root)
    return write_exact(load_part(layout, name), layout.probes(), layout.exact(name))


def _analysis(layout: StudyLayout, config: StudyConfig, parts: Sequence[ZooPart], narrator: Narrator) -> None:
    """What is published: labels and signals, selectors trained on them with their reports, and the results."""
    data = StudyData.load(layout, TrainConfig())
    export_dataset(data.small, layout.results)
    if data.large:
        export_dataset(data.large, layout.results / "large")
    for name, arms in (("selector", ARMS), ("selector_of_all_arms", ALL_ARMS)):
        train_dataset_stage(layout.results / "labels.parquet", layout.results / name, data.config, narrator, arms)
    with narrator.stage("analysis") as stage:
        found = analyse(data, layout.root / "analysis", narrator.say)
        stage.result = f"{len(found)} sections -> {write_results(found, layout.results)}"


def _label(
    what: str,
    layout: StudyLayout,
    config: StudyConfig,
    part: ZooPart,
    plans: Sequence[MergePlan],
    narrator: Narrator,
) -> None:
    """Labels of plans of one base, and a manifest when none is missing."""
    catalogue = load_catalogue(layout.catalogue(part.name))
    with narrator.stage(f"{what} {part.name}") as stage:
        tasks = load_tasks(layout.zoo / "tasks")
        search = SearchConfig(evaluator=config.evaluator, concurrency=config.concurrency)
        kept = {"evaluator": config.evaluator, "plans": digest_json([plan.id for plan in plans])}
        inputs = {f"checkpoint {key}": value for key, value in catalogue.digests().items()}
        inputs |= {f"task {key}": task.digest for key, task in tasks.items()}
        manifest = Manifest(what, kept, inputs)
        path = layout.labels(part.name) / "_study" / f"{what}.json"
        if manifest.is_current(path):
            stage.result = UNCHANGED
            return
        from simmerge_ray.on_ray.merge_search import run_search

        started = time.monotonic()
        with search_bar(narrator) as report:
            result = run_search(catalogue, tasks, search, layout.labels(part.name), plans, report)
        result.store.compact()
        manifest.write(path, time.monotonic() - started, {"num_labels": result.num_labels})
        stage.result = (
            f"{result.num_trials_run} merges evaluated, {result.num_labels} labels "
            f"({len(result.infeasible)} infeasible) -> {layout.labels(part.name)}"
        )


_RUN: Mapping[str, Callable[[StudyLayout, StudyConfig, Sequence[ZooPart], Narrator], None]] = {
    "zoo": _zoo,
    "signals": _signals,
    "pairs": _pairs,
    "plans": _plans,
    "probes": _probes,
    "exact": _exact,
    "analysis": _analysis,
}
