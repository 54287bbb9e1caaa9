"""The stages of the study on Ray: its zoo, signals of every base, labels of pairs and longer plans, and the analysis.

Every stage keeps what is there, so an interrupted study goes on with the same command. Labels of each base lie in a
store of their own, and are folded into one file when its stage is complete.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from simmerge_ray.base.config import SearchConfig, StudyConfig, TrainConfig
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import Manifest, digest_json, write_atomically
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.on_ray.resources import ray_session
from simmerge_ray.on_ray.tasks import run_tasks
from simmerge_ray.pipelines.dataset import UNCHANGED, input_digests, search_bar
from simmerge_ray.pipelines.demo import SIGNALS
from simmerge_ray.pipelines.stages import signals_stage, train_dataset_stage
from simmerge_ray.pipelines.zoo import make_zoo_parts, write_questions
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.research.study.analysis import ALL_ARMS, ARMS
from simmerge_ray.research.study.exact_sample import write_exact
from simmerge_ray.research.study.layout import StudyLayout, export_dataset, load_part, probe_variants
from simmerge_ray.research.study.longer import unmerged_utilities
from simmerge_ray.research.study.merges import draw_subsets, every_subset, labelled_pairs, plans_of
from simmerge_ray.research.study.page import write_results
from simmerge_ray.research.study.results import StudyData, analyse
from simmerge_ray.research.study.zoo import ZooPart, zoo_part
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.search.labels import LabelStore

STAGES = ("zoo", "signals", "pairs", "plans", "probes", "exact", "analysis")
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
    """Run stages of a study in `root`; what is current is kept, so after an error the next call goes on."""
    study = _Study(StudyLayout(root.resolve()), config, study_parts(config), narrator)
    chosen = [stage for stage in STAGES if stage in stages]
    with ray_session() if set(chosen) - {"analysis"} else nullcontext():
        for stage in chosen:
            getattr(study, stage)()


def _exact_features(root: Path, name: str) -> int:
    layout = StudyLayout(root)
    return write_exact(load_part(layout, name), layout.probes(), layout.exact(name))


@dataclass(frozen=True)
class _Study:
    """A method for each of `STAGES`."""

    layout: StudyLayout
    config: StudyConfig
    all_parts: Sequence[ZooPart]
    narrator: Narrator

    def zoo(self) -> None:
        with self.narrator.stage("zoo") as stage, self.narrator.status_bar("checkpoints trained") as report:
            write_questions(self.layout.zoo, self.config.num_items, self.config.num_probes)
            num_trained = make_zoo_parts(self.layout.zoo, self.all_parts, lambda done, total: report(done, total, ""))
            num_all = sum(1 + len(part.experts) for part in self.all_parts)
            stage.result = f"{num_trained} checkpoints trained, {num_all} in all -> {self.layout.zoo}"

    def signals(self, variant: str = "") -> None:
        for part in self.all_parts:
            out = self.layout.signals(part.name, variant)
            catalogue, probes = self.layout.catalogue(part.name), self.layout.probes(variant)
            signals_stage(catalogue, probes, out, SIGNALS.model_copy(update={"answers": False}), self.narrator)

    def probes(self) -> None:
        """Signals from fewer probes, and from those of another domain: what the final gain owes to them."""
        for variant, files in probe_variants(self.layout.probes()).items():
            for name, data in files.items():
                write_atomically(self.layout.probes(variant) / name, data)
            self.signals(variant)

    def pairs(self) -> None:
        for part in self.all_parts:
            catalogue = load_catalogue(self.layout.catalogue(part.name))
            singles = [MergePlan(source=ref.id) for ref in catalogue.all_refs]
            self._label("pairs", part, [*singles, *labelled_pairs(catalogue)])

    def plans(self) -> None:
        for number, part in enumerate(self.all_parts):
            self._label("plans", part, list(self._longer_plans(part, with_full=number == 0)))

    def exact(self) -> None:
        """Exact features of a sample of three-way plans, a file for each small base; a task for each, one CPU."""
        names = [part.name for part in self.all_parts if part.name[0] == "s"]
        missing = [name for name in names if not self.layout.exact(name).exists()]
        with self.narrator.stage("exact") as stage, self.narrator.bar("bases") as report:
            calls = deque((self.layout.root, name) for name in missing)
            for done, _ in enumerate(run_tasks(_exact_features, calls), 1):
                report(done, len(missing))
            stage.result = f"{len(missing)} bases -> {self.layout.root / 'exact'}" if missing else UNCHANGED

    def analysis(self) -> None:
        """What is published: labels and signals, selectors trained on them with their reports, and the results."""
        data, results, say = StudyData.load(self.layout, TrainConfig()), self.layout.results, self.narrator.say
        export_dataset(data.small, results)
        if data.large:
            export_dataset(data.large, results / "large")
        for name, arms in (("selector", ARMS), ("selector_of_all_arms", ALL_ARMS)):
            train_dataset_stage(results / "labels.parquet", results / name, data.config, self.narrator, arms)
        with self.narrator.stage("analysis") as stage:
            sections = analyse(data, self.layout.root / "analysis", say)
            stage.result = f"{len(sections)} sections -> {write_results(sections, results)}"

    def _longer_plans(self, part: ZooPart, with_full: bool) -> Iterator[MergePlan]:
        catalogue, seed = load_catalogue(self.layout.catalogue(part.name)), part.base.seed
        utilities = unmerged_utilities(LabelStore(self.layout.labels(part.name)).read())
        for size, num in sorted(self.config.num_subsets.items()):
            for subset in draw_subsets(catalogue, size, num, seed):
                yield from plans_of(subset, catalogue, utilities, self.config.num_orders, self.config.num_mixed, seed)
        if with_full and self.config.num_full:
            ids = sorted(catalogue.ids)
            members = ids[:: max(1, len(ids) // self.config.num_full)][: self.config.num_full]
            yield from every_subset(members, FULL_PLANS, seed)

    def _label(self, what: str, part: ZooPart, plans: Sequence[MergePlan]) -> None:
        """Labels of plans of one base, and a manifest when none is missing."""
        catalogue, labels = load_catalogue(self.layout.catalogue(part.name)), self.layout.labels(part.name)
        with self.narrator.stage(f"{what} {part.name}") as stage:
            tasks = load_tasks(self.layout.zoo / "tasks")
            search = SearchConfig(evaluator=self.config.evaluator, concurrency=self.config.concurrency)
            kept = {"evaluator": self.config.evaluator, "plans": digest_json([plan.id for plan in plans])}
            manifest = Manifest(what, kept, input_digests(catalogue, tasks))
            path = labels / "_study" / f"{what}.json"
            if manifest.is_current(path):
                stage.result = UNCHANGED
                return
            from simmerge_ray.on_ray.merge_search import run_search

            started = time.monotonic()
            with search_bar(self.narrator) as report:
                result = run_search(catalogue, tasks, search, labels, plans, report)
            result.store.compact()
            manifest.write(path, time.monotonic() - started, {"num_labels": result.num_labels})
            stage.result = (
                f"{result.num_trials_run} merges evaluated, {result.num_labels} labels "
                f"({len(result.infeasible)} infeasible) -> {labels}"
            )
