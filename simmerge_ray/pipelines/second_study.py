"""The second study: experts of a pretrained model on real tasks, their merges, and small bases with experts.

Every stage keeps what is there, so an interrupted one goes on with the same command.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import jsonl_bytes, new_directory, read_json, write_atomically, write_json
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue, write_catalogue
from simmerge_ray.checkpoints.probes import ProbeSet, load_probe_sets
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.pipelines.choices import ChoiceTask, choice_file, choose_for, chosen_of, missing_choices, read_choice
from simmerge_ray.pipelines.zoo import BASE_ID, is_trained, make_zoo_parts, write_questions
from simmerge_ray.plans.plan import MergePlan, plan_from_json
from simmerge_ray.plans.recipe import plain_average
from simmerge_ray.research.second_study.held_out import EXACT, held_out_values, value_rows
from simmerge_ray.research.second_study.real_analysis import real_figures
from simmerge_ray.research.second_study.real_labels import (
    NUM_SIGNAL_PROBES,
    fixed_candidates,
    label_tasks,
    pair_order,
)
from simmerge_ray.research.second_study.real_recipes import RealRecipe, draw_real_experts, pilot_recipes
from simmerge_ray.research.second_study.real_tasks import REAL_TASKS, RealData
from simmerge_ray.research.second_study.results import measured_means, publish_results, read_results
from simmerge_ray.research.second_study.small import FIRST_SMALL_SEED, NUM_SMALL_BASES, foreign_part
from simmerge_ray.search.evaluation import load_tasks
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
)
NUM_REAL_PROBES = 64
_ENGINE = SearchConfig(evaluator="transformers", pairs="all", dtype="bfloat16")  # of choices and labels; half the time


Part = TypeVar("Part")


@dataclass(frozen=True)
class SecondStudy:
    """A method for each of `STAGES`.

    root: `real/` and `small/` lie in it. tasks: directory of the real tasks. base: the pretrained checkpoint. share:
    (i, n) takes every n-th expert, pair and checkpoint from the i-th on, so that n processes do the work of one.
    num_pairs: of the real zoo; the first of their order.
    """

    root: Path
    tasks: Path | None
    base: Path | None
    narrator: Narrator
    share: tuple[int, int] = (0, 1)
    num_pairs: int | None = None

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
        task = self._choice_task()
        with self.narrator.stage("real-choices") as stage, self.narrator.status_bar("pairs") as report:
            keys = dict(missing_choices(task))
            missing = [pair for pair in self._pairs(task.catalogue) if pair in keys]
            for number, pair in enumerate(missing):
                report(number, len(missing), " + ".join(pair))
                choose_for(task, pair, keys[pair])
            stage.result = f"{len(missing)} pairs -> {task.directory}"

    def real_labels(self) -> None:
        """Utilities of every checkpoint, of fixed candidates of every pair, and of what was chosen; with what each
        keeps of its members' answers."""
        catalogue, _ = self._zoo()
        plans: dict[MergePlan, tuple[str, ...]]
        plans = dict.fromkeys(self._mine([MergePlan(source=ref.id) for ref in catalogue.all_refs]), ())
        choices = self._directory("choices")
        for pair in self._pairs(catalogue):
            plans |= dict.fromkeys(fixed_candidates(*pair).values(), ())
            if choice_file(choices, pair).exists():
                plan = read_choice(choices, pair).plan  # a scaled checkpoint too is asked for the tasks of both
                plans[plan] = tuple(dict.fromkeys((*plans.get(plan, ()), *catalogue.pair_tasks(*pair))))
        with self.narrator.stage("real-labels") as stage:
            self._measure(plans)
            stage.result = f"{len(plans)} checkpoints and merges -> {self._directory('labels')}"

    def real_four(self) -> None:
        """The choice among the first expert of each task, and then what it, the plain average, the experts and the base
        are worth: README's first table."""
        task = self._choice_task()
        own_task = task.catalogue.own_task
        first = {own: name for name in reversed(task.catalogue.ids) if (own := own_task.get(name))}
        members = tuple(name for name in task.catalogue.ids if name in first.values())
        with self.narrator.stage("real-four") as stage:
            out = self._directory("four")
            content = chosen_of(task, members, out)
            plans = {json.dumps(row["plan"]): plan_from_json(row["plan"]) for row in content["candidates"]}
            kept = [plan for plan in plans.values() if plan.source is not None or plan.recipe == plain_average(members)]
            self._measure(dict.fromkeys([plan_from_json(content["best"]["plan"]), *kept], tuple(sorted(first))))
            measured = measured_means(self._directory("labels"))
            rows = [row | {"measured": measured.get(plans[json.dumps(row["plan"])])} for row in content["candidates"]]
            write_json(out / "four.json", content | {"candidates": rows})
            stage.result = f"{content['best']['label']} -> {out}"

    def real_results(self) -> None:
        """Labels and choices as they are published (docs/study/second), with the figures of the plan's hypotheses."""
        with self.narrator.stage("real-results") as stage:
            catalogue, _ = self._zoo()
            made = self._directory("choices")
            choices = {
                pair: (one.plan, one.keeps)
                for pair in pair_order(catalogue)
                if choice_file(made, pair).exists() and (one := read_choice(made, pair))
            }
            out = self._directory("results")
            num_labels = publish_results(out, self._directory("labels"), catalogue, choices)
            write_json(out / "figures.json", real_figures(read_results(out)))
            stage.result = f"{num_labels} labels, {len(choices)} choices -> {out}"

    def small_zoos(self) -> None:
        """The small bases and their experts, on Ray."""
        parts = [foreign_part(seed) for seed in range(FIRST_SMALL_SEED, FIRST_SMALL_SEED + NUM_SMALL_BASES)]
        zoo = self.root / "small" / "zoo"
        with self.narrator.stage("small-zoos") as stage, self.narrator.status_bar("checkpoints trained") as report:
            write_questions(zoo)
            num_trained = make_zoo_parts(zoo, parts, lambda done, total: report(done, total, ""))
            stage.result = f"{num_trained} checkpoints trained -> {zoo}"

    def _mine(self, every: Sequence[Part]) -> list[Part]:
        first, step = self.share
        return list(every[first::step])

    def _pairs(self, catalogue: Catalogue) -> list[Pair]:
        return self._mine(pair_order(catalogue)[: self.num_pairs])

    def _choice_task(self) -> ChoiceTask:
        directory = self._directory("choices")
        return ChoiceTask(*self._zoo(), FindConfig(tune="none"), str(directory / "signatures"), directory, _ENGINE)

    def _measure(self, plans: Mapping[MergePlan, Sequence[str]]) -> None:
        """Label plans, with further tasks of each."""
        from simmerge_ray.research.labelling import measure_plans, tokenizer_of

        catalogue, probe_sets = self._zoo()
        tasks = label_tasks(load_tasks(self._directory("zoo") / "tasks"), tokenizer_of(catalogue))
        few = {name: ProbeSet(name, one.probes[:NUM_SIGNAL_PROBES]) for name, one in probe_sets.items()}
        with self.narrator.status_bar("merges measured") as bar:
            labels = self._directory("labels")
            measure_plans(catalogue, tasks, few, labels, plans, lambda done, of: bar(done, of, ""), _ENGINE.dtype)

    def _zoo(self) -> tuple[Catalogue, dict[str, ProbeSet]]:
        """The real zoo's catalogue and probes."""
        zoo = self._directory("zoo")
        return load_catalogue(zoo / "catalogue.yaml"), load_probe_sets(zoo / "probes")

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
