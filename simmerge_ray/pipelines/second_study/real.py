"""Experts of a pretrained model on real tasks, their merges, and what `auto` chooses among them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.base.storage import jsonl_bytes, new_directory, read_json, write_atomically, write_json
from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue, write_catalogue
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.pipelines.choices import chosen_of
from simmerge_ray.pipelines.second_study.run import StudyRun, publish
from simmerge_ray.pipelines.second_study.work import MergeWork
from simmerge_ray.pipelines.zoo import BASE_ID, is_trained
from simmerge_ray.plans.plan import plan_from_json
from simmerge_ray.plans.recipe import plain_average
from simmerge_ray.research.second_study.analysis import real_figures
from simmerge_ray.research.second_study.candidates import NUM_REAL_ITEMS, pair_order, set_candidates, set_order
from simmerge_ray.research.second_study.held_out import EXACT, held_out_values, value_rows
from simmerge_ray.research.second_study.real_recipes import RealRecipe, draw_real_experts, pilot_recipes
from simmerge_ray.research.second_study.real_tasks import REAL_TASKS, RealData
from simmerge_ray.research.second_study.results import SETS, measured_means
from simmerge_ray.research.second_study.sets import SIZES, read_sets, set_figures
from simmerge_ray.selector.data.splits import Pair

NUM_REAL_PROBES = 64
_AS_SHIPPED = SearchConfig(evaluator="transformers", pairs="all")
_ENGINE = _AS_SHIPPED.model_copy(update={"dtype": "bfloat16"})  # of choices among pairs, and labels; half the time


@dataclass(frozen=True)
class RealStages:
    """A method for each stage of the real zoo. Raises ConfigError: without tasks or base."""

    run: StudyRun

    def __post_init__(self) -> None:
        if not (self.run.tasks and self.run.base):
            raise ConfigError(
                "the real zoo needs --tasks, a directory of real tasks, and --base, a pretrained checkpoint"
            )

    def pilot(self) -> None:
        """One expert a task by a plain recipe, and what it is worth on held-out training examples, beside the base."""
        recipes = pilot_recipes(self._data_digest())
        self._train("real-pilot", recipes, "pilot")
        self._assess("pilot", [self._ref(recipe, "pilot") for recipe in recipes])

    def zoo(self) -> None:
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

    def held_out(self) -> None:
        """What the base and every expert are worth on held-out training examples."""
        self._assess("zoo", list(load_catalogue(self._directory("zoo") / "catalogue.yaml").checkpoints))

    def choices(self) -> None:
        """The choice without labels for every pair of two tasks, from probes alone."""
        work = self._real_work
        with self.run.narrator.stage("real-choices") as stage, self.run.narrator.status_bar("pairs") as report:
            stage.result = f"{work.choose(self._real_pairs(work), report)} pairs -> {work.choices}"

    def labels(self) -> None:
        """Utilities of every checkpoint, of fixed candidates of every pair, and of what was chosen; with what each
        keeps of its members' answers."""
        work = self._real_work
        mine = self.run.mine([ref.id for ref in work.catalogue.all_refs])
        with self.run.narrator.stage("real-labels") as stage, self.run.narrator.status_bar("merges measured") as report:
            num = work.label(self._real_pairs(work), mine, report)
            stage.result = f"{num} checkpoints and merges -> {work.labels}"

    def four(self) -> None:
        """The choice among the first expert of each task, and then what it, the plain average, the experts and the base
        are worth: README's first table."""
        work = replace(self._set_work, find=FindConfig(tune="none"))
        task = work.choice_task
        own_task = task.catalogue.own_task
        first = {own: name for name in reversed(task.catalogue.ids) if (own := own_task.get(name))}
        members = tuple(name for name in task.catalogue.ids if name in first.values())
        with self.run.narrator.stage("real-four") as stage, self.run.narrator.status_bar("merges measured") as report:
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

    def sets(self) -> None:
        """The choice among sets of experts of as many tasks, in float32 as `auto` is shipped, and what it, the
        candidates of `set_candidates`, the experts and the base are worth; one set after the other."""
        work = self._set_work
        size, catalogue = self.run.num_members, work.catalogue
        groups = self.run.mine(set_order(catalogue, size)[: self.run.num_pairs])
        checkpoints = [ref.id for ref in catalogue.all_refs]
        with self.run.narrator.stage("real-sets") as stage, self.run.narrator.status_bar("sets") as report:
            for number, members in enumerate(groups):
                report(number, len(groups), " + ".join(members))
                work.choose([members], _untold)
                work.label([members], checkpoints, _untold)
            stage.result = f"{len(groups)} sets of {size} -> {work.labels}"

    def sets_results(self) -> None:
        """Labels and choices of sets of any size as they are published (docs/study/second/sets)."""
        work = self._set_work
        groups = [group for size in SIZES for group in set_order(work.catalogue, size)]
        publish(self.run, "real/sets", [work.made(groups)], set_figures, read_sets)

    def results(self) -> None:
        """Labels and choices as they are published (docs/study/second/real), with the figures of the plan's
        hypotheses."""
        work = self._real_work
        publish(self.run, "real", [work.made(pair_order(work.catalogue))], real_figures)

    def _real_pairs(self, work: MergeWork) -> list[Pair]:
        return self.run.mine(pair_order(work.catalogue)[: self.run.num_pairs])

    @property
    def _real_work(self) -> MergeWork:
        return self._work(self._directory("."), _ENGINE, "real")

    @property
    def _set_work(self) -> MergeWork:
        work = self._work(self._directory("sets"), _AS_SHIPPED, SETS)
        return replace(work, find=FindConfig(), labelled_in=_ENGINE.dtype, candidates=set_candidates)

    def _work(self, made: Path, engine: SearchConfig, kind: str) -> MergeWork:
        zoo, find = self._directory("zoo"), FindConfig(tune="none")
        places = (zoo / "catalogue.yaml", zoo / "probes", zoo / "tasks", made / "choices", made / "labels")
        return MergeWork(*places, find, engine, NUM_REAL_ITEMS, published=self.run.published_of(kind))

    @property
    def _data(self) -> RealData:
        assert self.run.tasks is not None, "checked before the first stage"
        return RealData(self.run.tasks)

    def _data_digest(self) -> str:
        return self._data.digest()

    def _directory(self, kind: str) -> Path:
        return (self.run.root / "real" / kind).resolve()

    def _base_path(self) -> Path:
        """The base as a checkpoint of the zoo's directory, copied once."""
        assert self.run.base is not None, "checked before the first stage"
        path = self._directory("zoo") / BASE_ID
        if not path.exists():
            with new_directory(path) as directory:
                shutil.copytree(self.run.base, directory, dirs_exist_ok=True)
        return path

    def _ref(self, recipe: RealRecipe, kind: str) -> CheckpointRef:
        path = self._directory(kind) / recipe.name
        if recipe.lora_rank is None:
            return CheckpointRef(recipe.name, path, BASE_ID)
        return CheckpointRef(recipe.name, self._base_path(), BASE_ID, adapter=path)

    def _train(self, name: str, recipes: Sequence[RealRecipe], kind: str) -> None:
        from simmerge_ray.research.second_study.real_training import train_real_expert

        mine = self.run.mine(recipes)
        missing = [recipe for recipe in mine if not is_trained(self._directory(kind) / recipe.name, recipe)]
        with self.run.narrator.stage(name) as stage, self.run.narrator.status_bar("training steps") as report:
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
        with (
            self.run.narrator.stage(f"{kind} held out") as stage,
            self.run.narrator.status_bar("checkpoints") as report,
        ):
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
        self.run.narrator.print_lines(rows)

    def _made_by(self, ref: CheckpointRef) -> str | None:
        recipe = (ref.adapter or ref.path) / "recipe.json"
        return read_json(recipe)["digest"] if recipe.exists() else None


def _untold(done: int, of: int, line: str) -> None:
    """The progress of a part of what is told."""
