"""Choices and labels of merges of one base's checkpoints: made once each, so that an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.base.progress import StatusReport
from simmerge_ray.base.storage import write_json
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.checkpoints.probes import ProbeSet, load_probe_sets
from simmerge_ray.pipelines.choices import ChoiceTask, choice_file, choose_for, missing_choices, read_choice
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.research.second_study.candidates import NUM_SIGNAL_PROBES, fixed_candidates, label_tasks
from simmerge_ray.research.second_study.results import Chosen, MadeZoo, published_choices
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.search.labels import LabelStore
from simmerge_ray.selector.data.splits import Group


@dataclass(frozen=True)
class MergeWork:
    """Work on one base: merges of pairs, or of larger sets.

    catalogue_file, probes, tasks: of its zoo. choices, labels: directories. find: how `auto` chooses. engine: runs what
    is chosen among. labelled_in: precision of what is labelled, or of the engine. num_items: of each task that is
    labelled; None: all. candidates: of some members, labelled beside what is chosen. published: a directory of
    `publish_results`, whose labels and choices of the same checkpoints are not made again.
    """

    catalogue_file: Path
    probes: Path
    tasks: Path
    choices: Path
    labels: Path
    find: FindConfig
    engine: SearchConfig
    num_items: int | None = None
    labelled_in: Literal["float32", "bfloat16"] | None = None
    candidates: Callable[[Group], Mapping[str, MergePlan]] = fixed_candidates
    published: Path | None = None

    @property
    def catalogue(self) -> Catalogue:
        return load_catalogue(self.catalogue_file)

    @property
    def choice_task(self) -> ChoiceTask:
        signatures = str(self.choices / "signatures")
        return ChoiceTask(self.catalogue, self._probe_sets, self.find, signatures, self.choices, self.engine)

    def choose(self, groups: Sequence[Group], report: StatusReport) -> int:
        """The choice without labels, from probes alone, for those that have none; how many these were."""
        self._take_over()
        task = self.choice_task
        missing = missing_choices(task, groups)
        for number, (members, key) in enumerate(missing):
            report(number, len(missing), " + ".join(members))
            choose_for(task, members, key)
        return len(missing)

    def label(self, groups: Sequence[Group], checkpoints: Sequence[str], report: StatusReport) -> int:
        """Utilities of checkpoints, of the groups' candidates and of what was chosen, with what each keeps of its
        members' answers; the number of plans."""
        self._take_over()
        catalogue = self.catalogue
        plans: dict[MergePlan, tuple[str, ...]] = {MergePlan(source=name): () for name in checkpoints}
        for members in groups:
            plans |= dict.fromkeys(self.candidates(members).values(), ())
            if choice_file(self.choices, members).exists():
                choice = read_choice(self.choices, members)
                for plan in (*choice.plans, choice.answer):  # a scaled checkpoint too is asked for the tasks of all
                    plans[plan] = tuple(dict.fromkeys((*plans.get(plan, ()), *catalogue.tasks_of(members))))
        self.measure(plans, report)
        return len(plans)

    def measure(self, plans: Mapping[MergePlan, Sequence[str]], report: StatusReport) -> None:
        """Label plans, with further tasks of each."""
        from simmerge_ray.research.labelling import measure_plans, tokenizer_of

        catalogue = self.catalogue
        tasks = label_tasks(load_tasks(self.tasks), tokenizer_of(catalogue), self.num_items)
        few = {name: ProbeSet(name, one.probes[:NUM_SIGNAL_PROBES]) for name, one in self._probe_sets.items()}
        dtype = self.labelled_in or self.engine.dtype
        measure_plans(catalogue, tasks, few, self.labels, plans, lambda done, of: report(done, of, ""), dtype)

    def made(self, groups: Iterable[Group]) -> MadeZoo:
        """What is there of them, in their order."""
        choices = {
            members: Chosen(one.plan, one.tuned, one.answer, one.keeps, one.key)
            for members in groups
            if choice_file(self.choices, members).exists() and (one := read_choice(self.choices, members))
        }
        return MadeZoo(self.catalogue, self.labels, choices)

    def _take_over(self) -> None:
        """Begin with what is published, where nothing is there yet."""
        if self.published is None:
            return
        catalogue = self.catalogue
        assert catalogue.base is not None, "of every zoo of the study"
        if not self.labels.exists():
            digests = catalogue.digests()
            labels = LabelStore(self.published / "labels").read()
            LabelStore(self.labels).append([one for one in labels if one.checkpoints.items() <= digests.items()])
        for members, one in published_choices(self.published, catalogue.base.id).items():
            path = choice_file(self.choices, members)
            if not path.exists():
                plans = {"candidates": [one.plan], "tuned": [one.tuned] if one.tuned else []}
                rows = {name: [{"plan": plan.to_json()} for plan in some] for name, some in plans.items()}
                best = {"plan": one.answer.to_json()}
                write_json(path, {"key": one.key, "keeps": dict(one.keeps), "best": best} | rows)

    @property
    def _probe_sets(self) -> dict[str, ProbeSet]:
        return load_probe_sets(self.probes)
