"""The second study: experts of a pretrained model on real tasks, their merges, and small bases with experts.

Every stage keeps what is there, so an interrupted one goes on with the same command.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import jsonl_bytes, new_directory, read_json, write_atomically, write_json
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue, write_catalogue
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.pipelines.choices import chosen_of
from simmerge_ray.pipelines.second_study.pairs import PairWork
from simmerge_ray.pipelines.zoo import BASE_ID, is_trained, make_zoo_parts, write_questions
from simmerge_ray.plans.plan import plan_from_json
from simmerge_ray.plans.recipe import plain_average
from simmerge_ray.research.second_study.analysis import real_figures, small_figures
from simmerge_ray.research.second_study.candidates import NUM_REAL_ITEMS, pair_order
from simmerge_ray.research.second_study.held_out import EXACT, held_out_values, value_rows
from simmerge_ray.research.second_study.real_recipes import RealRecipe, draw_real_experts, pilot_recipes
from simmerge_ray.research.second_study.real_tasks import REAL_TASKS, RealData
from simmerge_ray.research.second_study.results import (
    LabelledZoos,
    MadeZoo,
    measured_means,
    publish_results,
    read_results,
)
from simmerge_ray.research.second_study.small import (
    FIRST_SMALL_SEED,
    NUM_SMALL_BASES,
    NUM_SMALL_PAIRS,
    foreign_part,
)
from simmerge_ray.research.study.zoo import ZooPart
from simmerge_ray.selector.data.splits import Pair

STAGES = (
    "real-pilot",
    "real-zoo",
    "real-held-out",
    "real-choices",
    "real-labels",
    "real-results",
    "real-four",
    "small-zoos",
    "small-choices",
    "small-labels",
    "small-results",
)
NUM_REAL_PROBES = 64
_ENGINE = SearchConfig(evaluator="transformers", pairs="all", dtype="bfloat16")  # of choices and labels; half the time


Part = TypeVar("Part")


@dataclass(frozen=True)
class SecondStudy:
    """A method for each of `STAGES`.

    root: `real/` and `small/` lie in it. tasks: directory of the real tasks. base: the pretrained checkpoint. share:
    (i, n) takes every n-th expert, pair and checkpoint from the i-th on, so that n processes do the work of one.
    num_pairs: of every base, the first of their order (all of the real zoo, `NUM_SMALL_PAIRS` of a small one).
    num_bases: the first small ones; a share is of these, since a base's pairs stay together.
    """

    root: Path
    tasks: Path | None
    base: Path | None
    narrator: Narrator
    share: tuple[int, int] = (0, 1)
    num_pairs: int | None = None
    num_bases: int | None = None

    def run(self, stages: Sequence[str]) -> None:
        """Run those of `STAGES`, in their order. ConfigError: a real one, without tasks or base."""
        if any(stage.startswith("real") for stage in stages) and not (self.tasks and self.base):
            raise ConfigError(
                "the real zoo needs --tasks, a directory of real tasks, and --base, a pretrained checkpoint"
            )
        for stage in STAGES:
            if stage in stages:
                getattr(self, stage.replace("-", "_"))()

    def real_pilot(self) -> None:
        """One expert a task by a plain recipe, and what it is worth on held-out training examples, beside the base."""
        recipes = pilot_recipes(self._data_digest())
        self._train("real-pilot", recipes, "pilot")
        self._assess("pilot", [self._ref(recipe, "pilot") for recipe in recipes])

    def real_zoo(self) -> None:
        """The experts, one at a time, with their catalogue, probes and tasks."""
        data, recipes = self._data, draw_real_experts(self._data_digest())
        zoo = self._directory("zoo")
        for name, task in REAL_TASKS.items():
            probes = [{"text": text} for text in data.probes(name, NUM_REAL_PROBES)]
            write_atomically(zoo / "probes" / f"{name}.jsonl", jsonl_bytes(probes))
            items = [one._asdict() for one in data.items(name)]
            for metric, directory in {EXACT: "tasks-exact", task.metric: "tasks"}.items():
                rows = [task.settings(metric), *items]
                write_atomically(zoo / directory / f"{name}.jsonl", jsonl_bytes(rows))
        self._train("real-zoo", recipes, "zoo")
        refs = tuple(self._ref(recipe, "zoo") for recipe in recipes)
        own_task = {recipe.name: recipe.task for recipe in recipes}
        write_catalogue(zoo / "catalogue.yaml", Catalogue(refs, own_task, CheckpointRef(BASE_ID, self._base_path())))
        if all(is_trained(zoo / recipe.name, recipe) for recipe in recipes):  # the others' shares may not be there yet
            load_catalogue(zoo / "catalogue.yaml")

    def real_held_out(self) -> None:
        """What the base and every expert are worth on held-out training examples."""
        self._assess("zoo", list(load_catalogue(self._directory("zoo") / "catalogue.yaml").checkpoints))

    def real_choices(self) -> None:
        """The choice without labels for every pair of two tasks, from probes alone."""
        work = self._real_work
        with self.narrator.stage("real-choices") as stage, self.narrator.status_bar("pairs") as report:
            stage.result = f"{work.choose(self._real_pairs(work), report)} pairs -> {work.choices}"

    def real_labels(self) -> None:
        """Utilities of every checkpoint, of fixed candidates of every pair, and of what was chosen; with what each
        keeps of its members' answers."""
        work = self._real_work
        mine = self._mine([ref.id for ref in work.catalogue.all_refs])
        with self.narrator.stage("real-labels") as stage, self.narrator.status_bar("merges measured") as report:
            num = work.label(self._real_pairs(work), mine, report)
            stage.result = f"{num} checkpoints and merges -> {work.labels}"

    def real_four(self) -> None:
        """The choice among the first expert of each task, and then what it, the plain average, the experts and the base
        are worth: README's first table."""
        work = self._real_work
        task = work.choice_task
        own_task = task.catalogue.own_task
        first = {own: name for name in reversed(task.catalogue.ids) if (own := own_task.get(name))}
        members = tuple(name for name in task.catalogue.ids if name in first.values())
        with self.narrator.stage("real-four") as stage, self.narrator.status_bar("merges measured") as report:
            out = self._directory("four")
            content = chosen_of(task, members, out)
            plans = {json.dumps(row["plan"]): plan_from_json(row["plan"]) for row in content["candidates"]}
            kept = [plan for plan in plans.values() if plan.source is not None or plan.recipe == plain_average(members)]
            asked = [plan_from_json(content["best"]["plan"]), *kept]
            work.measure(dict.fromkeys(asked, tuple(sorted(first))), report)
            measured = measured_means(work.labels)
            rows = [row | {"measured": measured.get(plans[json.dumps(row["plan"])])} for row in content["candidates"]]
            write_json(out / "four.json", content | {"candidates": rows})
            stage.result = f"{content['best']['label']} -> {out}"

    def real_results(self) -> None:
        """Labels and choices as they are published (docs/study/second/real), with the figures of the plan's
        hypotheses."""
        self._publish("real", [self._real_work.made()], real_figures)

    def small_zoos(self) -> None:
        """The small bases and their experts: on Ray, or one after the other where processes share the work."""
        parts, zoo = self._small_parts, self.root / "small" / "zoo"
        with self.narrator.stage("small-zoos") as stage, self.narrator.status_bar("checkpoints trained") as report:
            write_questions(zoo)
            here = self.share != (0, 1)
            num_trained = make_zoo_parts(zoo, parts, lambda done, total: report(done, total, ""), here)
            stage.result = f"{num_trained} checkpoints trained -> {zoo}"

    def small_choices(self) -> None:
        """The answers of `auto` without labels for the first pairs of every small base."""
        with self.narrator.stage("small-choices") as stage, self.narrator.status_bar("pairs") as report:
            num = 0
            for name, work in self._small_works.items():
                num += work.choose(self._small_pairs(name, work), report)
            stage.result = f"{num} pairs -> {self.root / 'small' / 'choices'}"

    def small_labels(self) -> None:
        """Of every small base: checkpoints, fixed candidates of the first pairs and what was chosen for them."""
        with self.narrator.stage("small-labels") as stage, self.narrator.status_bar("merges measured") as report:
            num = 0
            for name, work in self._small_works.items():
                every = [ref.id for ref in work.catalogue.all_refs]
                num += work.label(self._small_pairs(name, work), every, report)
            stage.result = f"{num} checkpoints and merges -> {self.root / 'small' / 'labels'}"

    def small_results(self) -> None:
        """As `real_results`, of the bases that have labels."""
        works = {name: work for name, work in self._small_works.items() if work.labels.exists()}
        self._publish("small", [work.made(name) for name, work in works.items()], small_figures)

    @property
    def _small_parts(self) -> list[ZooPart]:
        seeds = range(FIRST_SMALL_SEED, FIRST_SMALL_SEED + (self.num_bases or NUM_SMALL_BASES))
        return [foreign_part(seed) for seed in self._mine(seeds)]

    @property
    def _small_works(self) -> dict[str, PairWork]:
        """By the base's name."""
        root = (self.root / "small").resolve()
        zoo = root / "zoo"
        return {
            part.name: PairWork(
                zoo / part.name / "catalogue.yaml",
                zoo / "probes",
                zoo / "tasks",
                root / "choices" / part.name,
                root / "labels" / part.name,
                FindConfig(),
                SearchConfig(evaluator="transformers", pairs="all"),
            )
            for part in self._small_parts
        }

    def _small_pairs(self, name: str, work: PairWork) -> list[Pair]:
        return pair_order(work.catalogue, name)[: self.num_pairs or NUM_SMALL_PAIRS]

    def _publish(
        self, kind: str, zoos: Sequence[MadeZoo], figures: Callable[[LabelledZoos], Mapping[str, Any]]
    ) -> None:
        out = (self.root / kind / "results").resolve()
        with self.narrator.stage(f"{kind}-results") as stage:
            num_labels = publish_results(out, zoos)
            write_json(out / "figures.json", figures(read_results(out)))
            stage.result = f"{num_labels} labels, {sum(len(zoo.choices) for zoo in zoos)} choices -> {out}"

    def _mine(self, every: Sequence[Part]) -> list[Part]:
        first, step = self.share
        return list(every[first::step])

    def _real_pairs(self, work: PairWork) -> list[Pair]:
        return self._mine(pair_order(work.catalogue)[: self.num_pairs])

    @property
    def _real_work(self) -> PairWork:
        zoo, find = self._directory("zoo"), FindConfig(tune="none")
        places = (zoo / "catalogue.yaml", zoo / "probes", zoo / "tasks")
        made = (self._directory("choices"), self._directory("labels"))
        return PairWork(*places, *made, find, _ENGINE, NUM_REAL_ITEMS)

    @property
    def _data(self) -> RealData:
        assert self.tasks is not None, "checked before the first stage"
        return RealData(self.tasks)

    def _data_digest(self) -> str:
        return self._data.digest()

    def _directory(self, kind: str) -> Path:
        return (self.root / "real" / kind).resolve()

    def _base_path(self) -> Path:
        """The base as a checkpoint of the zoo's directory, copied once."""
        assert self.base is not None, "checked before the first stage"
        path = self._directory("zoo") / BASE_ID
        if not path.exists():
            with new_directory(path) as directory:
                shutil.copytree(self.base, directory, dirs_exist_ok=True)
        return path

    def _ref(self, recipe: RealRecipe, kind: str) -> CheckpointRef:
        path = self._directory(kind) / recipe.name
        if recipe.lora_rank is None:
            return CheckpointRef(recipe.name, path, BASE_ID)
        return CheckpointRef(recipe.name, self._base_path(), BASE_ID, adapter=path)

    def _train(self, name: str, recipes: Sequence[RealRecipe], kind: str) -> None:
        from simmerge_ray.research.second_study.real_training import train_real_expert

        mine = self._mine(recipes)
        missing = [recipe for recipe in mine if not is_trained(self._directory(kind) / recipe.name, recipe)]
        with self.narrator.stage(name) as stage, self.narrator.status_bar("training steps") as report:
            total = sum(recipe.num_steps for recipe in missing)
            done = 0
            for recipe in missing:

                def said(step: int, _: int, recipe: RealRecipe = recipe, before: int = done) -> None:
                    report(before + step, total, recipe.name)

                out = self._directory(kind) / recipe.name
                train_real_expert(recipe, self._base_path(), self._data, out, said)
                done += recipe.num_steps
            stage.result = f"{len(missing)} experts trained, {len(mine)} in all -> {self._directory(kind)}"

    def _assess(self, kind: str, refs: Sequence[CheckpointRef]) -> None:
        """Values of the base and the checkpoints, a file each, and a table of them."""
        values, digest = {}, self._data_digest()
        with self.narrator.stage(f"{kind} held out") as stage, self.narrator.status_bar("checkpoints") as report:
            for number, ref in enumerate(every := [CheckpointRef(BASE_ID, self._base_path()), *refs]):
                report(number, len(every), ref.id)
                path = self._directory("held-out") / f"{ref.id}.json"
                made_by = self._made_by(ref)
                kept = read_json(path) if path.exists() else {}
                if (kept.get("data"), kept.get("recipe")) != (digest, made_by):
                    kept = {"data": digest, "recipe": made_by, "values": held_out_values(ref, self._data)}
                    write_json(path, kept)
                values[ref.id] = kept["values"]
            rows = value_rows(values)
            write_atomically(self._directory("held-out") / f"{kind}.md", ("\n".join(rows) + "\n").encode())
            stage.result = f"{len(values)} checkpoints -> {self._directory('held-out')}"
        self.narrator.print_lines(rows)

    def _made_by(self, ref: CheckpointRef) -> str | None:
        recipe = (ref.adapter or ref.path) / "recipe.json"
        return read_json(recipe)["digest"] if recipe.exists() else None
