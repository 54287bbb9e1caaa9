"""Choices and labels of the pairs of one base: made once each, so that an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.base.progress import StatusReport
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.checkpoints.probes import ProbeSet, load_probe_sets
from simmerge_ray.pipelines.choices import ChoiceTask, choice_file, choose_for, missing_choices, read_choice
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.research.second_study.candidates import NUM_SIGNAL_PROBES, fixed_candidates, label_tasks, pair_order
from simmerge_ray.research.second_study.results import Chosen, MadeZoo
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.selector.data.splits import Pair


@dataclass(frozen=True)
class PairWork:
    """Work on one base.

    catalogue_file, probes, tasks: of its zoo. choices, labels: directories. find: how `auto` chooses. engine: runs what
    is chosen among and what is labelled. num_items: of each task that is labelled; None: all.
    """

    catalogue_file: Path
    probes: Path
    tasks: Path
    choices: Path
    labels: Path
    find: FindConfig
    engine: SearchConfig
    num_items: int | None = None

    @property
    def catalogue(self) -> Catalogue:
        return load_catalogue(self.catalogue_file)

    @property
    def choice_task(self) -> ChoiceTask:
        signatures = str(self.choices / "signatures")
        return ChoiceTask(self.catalogue, self._probe_sets, self.find, signatures, self.choices, self.engine)

    def choose(self, pairs: Sequence[Pair], report: StatusReport) -> int:
        """The choice without labels, from probes alone, for those of the pairs that have none; how many these were."""
        task = self.choice_task
        keys = dict(missing_choices(task))
        missing = [pair for pair in pairs if pair in keys]
        for number, pair in enumerate(missing):
            report(number, len(missing), " + ".join(pair))
            choose_for(task, pair, keys[pair])
        return len(missing)

    def label(self, pairs: Sequence[Pair], checkpoints: Sequence[str], report: StatusReport) -> int:
        """Utilities of checkpoints, of the pairs' fixed candidates and of what was chosen, with what each keeps of its
        members' answers; the number of plans."""
        catalogue = self.catalogue
        plans: dict[MergePlan, tuple[str, ...]] = {MergePlan(source=name): () for name in checkpoints}
        for pair in pairs:
            plans |= dict.fromkeys(fixed_candidates(*pair).values(), ())
            if choice_file(self.choices, pair).exists():
                choice = read_choice(self.choices, pair)
                for plan in (choice.plan, choice.answer):  # a scaled checkpoint too is asked for the tasks of both
                    plans[plan] = tuple(dict.fromkeys((*plans.get(plan, ()), *catalogue.pair_tasks(*pair))))
        self.measure(plans, report)
        return len(plans)

    def measure(self, plans: Mapping[MergePlan, Sequence[str]], report: StatusReport) -> None:
        """Label plans, with further tasks of each."""
        from simmerge_ray.research.labelling import measure_plans, tokenizer_of

        catalogue = self.catalogue
        tasks = label_tasks(load_tasks(self.tasks), tokenizer_of(catalogue), self.num_items)
        few = {name: ProbeSet(name, one.probes[:NUM_SIGNAL_PROBES]) for name, one in self._probe_sets.items()}
        measure_plans(
            catalogue, tasks, few, self.labels, plans, lambda done, of: report(done, of, ""), self.engine.dtype
        )

    def made(self, seed: int | str = 0) -> MadeZoo:
        """What is there, pairs in the order of `pair_order`."""
        catalogue = self.catalogue
        choices = {
            pair: Chosen(one.plan, one.answer, one.keeps)
            for pair in pair_order(catalogue, seed)
            if choice_file(self.choices, pair).exists() and (one := read_choice(self.choices, pair))
        }
        return MadeZoo(catalogue, self.labels, choices)

    @property
    def _probe_sets(self) -> dict[str, ProbeSet]:
        return load_probe_sets(self.probes)
