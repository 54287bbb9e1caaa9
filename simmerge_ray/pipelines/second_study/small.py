"""Small bases with the skills and not the formats, their experts, and merges."""

from __future__ import annotations

from dataclasses import dataclass

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.pipelines.second_study.run import StudyRun, publish
from simmerge_ray.pipelines.second_study.work import MergeWork
from simmerge_ray.pipelines.zoo import make_zoo_parts, write_questions
from simmerge_ray.research.second_study.analysis import small_figures
from simmerge_ray.research.second_study.candidates import pair_order
from simmerge_ray.research.second_study.small import (
    FIRST_SMALL_SEED,
    NUM_SMALL_BASES,
    NUM_SMALL_PAIRS,
    foreign_part,
)
from simmerge_ray.research.study.zoo import ZooPart
from simmerge_ray.selector.data.splits import Pair


@dataclass(frozen=True)
class SmallStages:
    """A method for each stage of the small zoos."""

    run: StudyRun

    def zoos(self) -> None:
        """The small bases and their experts: on Ray, or one after the other where processes share the work."""
        parts, zoo = self._small_parts, self.run.root / "small" / "zoo"
        with (
            self.run.narrator.stage("small-zoos") as stage,
            self.run.narrator.status_bar("checkpoints trained") as report,
        ):
            write_questions(zoo)
            here = self.run.share != (0, 1)
            num_trained = make_zoo_parts(zoo, parts, lambda done, total: report(done, total, ""), here)
            stage.result = f"{num_trained} checkpoints trained -> {zoo}"

    def choices(self) -> None:
        """The answers of `auto` without labels for the first pairs of every small base."""
        with self.run.narrator.stage("small-choices") as stage, self.run.narrator.status_bar("pairs") as report:
            num = 0
            for name, work in self._small_works.items():
                num += work.choose(self._small_pairs(name, work), report)
            stage.result = f"{num} pairs -> {self.run.root / 'small' / 'choices'}"

    def labels(self) -> None:
        """Of every small base: checkpoints, fixed candidates of the first pairs and what was chosen for them."""
        with (
            self.run.narrator.stage("small-labels") as stage,
            self.run.narrator.status_bar("merges measured") as report,
        ):
            num = 0
            for name, work in self._small_works.items():
                every = [ref.id for ref in work.catalogue.all_refs]
                num += work.label(self._small_pairs(name, work), every, report)
            stage.result = f"{num} checkpoints and merges -> {self.run.root / 'small' / 'labels'}"

    def results(self) -> None:
        """As of the real zoo, of the bases that have labels."""
        works = {name: work for name, work in self._small_works.items() if work.labels.exists()}
        publish(
            self.run,
            "small",
            [work.made(pair_order(work.catalogue, name)) for name, work in works.items()],
            small_figures,
        )

    @property
    def _small_parts(self) -> list[ZooPart]:
        seeds = range(FIRST_SMALL_SEED, FIRST_SMALL_SEED + (self.run.num_bases or NUM_SMALL_BASES))
        return [foreign_part(seed) for seed in self.run.mine(seeds)]

    @property
    def _small_works(self) -> dict[str, MergeWork]:
        """By the base's name."""
        root = (self.run.root / "small").resolve()
        zoo = root / "zoo"
        return {
            part.name: MergeWork(
                zoo / part.name / "catalogue.yaml",
                zoo / "probes",
                zoo / "tasks",
                root / "choices" / part.name,
                root / "labels" / part.name,
                FindConfig(),
                SearchConfig(evaluator="transformers", pairs="all"),
                published=self.run.published_of("small"),
            )
            for part in self._small_parts
        }

    def _small_pairs(self, name: str, work: MergeWork) -> list[Pair]:
        return pair_order(work.catalogue, name)[: self.run.num_pairs or NUM_SMALL_PAIRS]
