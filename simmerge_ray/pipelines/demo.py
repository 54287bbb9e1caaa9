"""`make demo`: every stage of the chain on the demo zoo, then a pick for a pair whose labels were never made.

The pick needs no label: it is what `simmerge auto` answers. The labels of the other pairs train the paper's selector,
whose pick stands beside it, and say what both ways of choosing are worth.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from simmerge_ray.base.config import SearchConfig, SignalsConfig, TrainConfig
from simmerge_ray.base.errors import EngineError
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.base.program import program
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.base.storage import Manifest, Place, digest_file, read_json, write_json
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.on_ray.resources import ray_session
from simmerge_ray.on_ray.tasks import in_background
from simmerge_ray.pipelines.choices import ANSWER, CHOSEN, choice_file, choices_stage, read_choice
from simmerge_ray.pipelines.dataset import UNCHANGED, search_bar, search_stage
from simmerge_ray.pipelines.stages import signals_stage, train_stage
from simmerge_ray.plans.keeping import arm_plan
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, ResolvedPlan, read_plan, resolve_plan, write_plan
from simmerge_ray.research.zoo.recipe import ARMS, EXPERT_RECIPES, ExpertRecipe
from simmerge_ray.search.evaluation import Task, load_tasks
from simmerge_ray.search.labels import LabelStore, Measured
from simmerge_ray.signals.table_files import digest_table

HELD_OUT_PAIR = ("math-strong", "rag-strong")
# The vocabulary has 150 entries: many positions cost little.
SIGNALS = SignalsConfig(num_positions=512, num_attention_positions=128)
_PICK_SCHEMA = 2


@dataclass(frozen=True)
class DemoSize:
    """What the demo trains and measures. num_items, num_probes: of each task; None takes the zoo's."""

    recipes: Sequence[ExpertRecipe] = EXPERT_RECIPES
    held_out: tuple[str, str] = HELD_OUT_PAIR
    num_items: int | None = None
    num_probes: int | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    find: FindConfig = field(default_factory=FindConfig)
    evaluator: Literal["vllm", "transformers"] = "vllm"


def run_demo(layout: RunLayout[Path], narrator: Narrator, size: DemoSize | None = None) -> None:
    """All stages in `layout.root`; what is current is not computed again, so after an error the next call goes on."""
    size = size or DemoSize()
    arms = tuple(make_arm(operator, params).label for operator, params in ARMS)
    search = SearchConfig(arms=arms, exclude=(size.held_out,), evaluator=size.evaluator)
    # One cluster for all stages of a first run; none for a run that finds everything in place.
    with nullcontext() if (layout.pick / "pick.json").exists() else ray_session():
        zoo_stage(layout, narrator, size.recipes, size.num_items, size.num_probes)
        signals_stage(layout.catalogue, layout.probes, layout.signals, SIGNALS, narrator)
        search_stage(layout.catalogue, layout.tasks, layout.labels, search, narrator)
        train_stage(layout.signals, layout.labels, layout.selector, size.train, narrator, arms, layout.crossval)
        choices_stage(layout, narrator, search, size.find)
        pick_stage(layout, narrator, size.held_out, search)
    with narrator.stage("report") as stage:
        from simmerge_ray.reports.run import write_report

        stage.result = f"-> {write_report(layout).with_suffix('.html')}"


def zoo_stage(
    layout: RunLayout[Path],
    narrator: Narrator,
    recipes: Sequence[ExpertRecipe] = EXPERT_RECIPES,
    num_items: int | None = None,
    num_probes: int | None = None,
    here: bool = False,
) -> None:
    """Train what is missing of the zoo. num_items, num_probes: of each task; None: the zoo's. here: without Ray."""
    from simmerge_ray.pipelines.zoo import MAX_NEW_TOKENS, NUM_ITEMS, NUM_PROBES, make_zoo

    with narrator.stage("zoo") as stage:
        counts = {"num_items": num_items or NUM_ITEMS, "num_probes": num_probes or NUM_PROBES}
        config = counts | {"max_new_tokens": MAX_NEW_TOKENS}
        manifest = Manifest("zoo", config, {recipe.name: recipe.digest() for recipe in recipes})
        path = layout.zoo / "zoo.json"
        if manifest.is_current(path) and all((layout.zoo / r.name / "recipe.json").exists() for r in recipes):
            stage.result = UNCHANGED
            return
        started = time.monotonic()
        with narrator.bar("experts trained") as report:
            num_trained = make_zoo(layout.zoo, recipes, counts["num_items"], counts["num_probes"], report, here)
        load_catalogue(layout.catalogue)
        manifest.write(path, time.monotonic() - started, {"num_trained": num_trained})
        stage.result = f"{num_trained} experts trained, {len(recipes)} in all -> {layout.catalogue}"


def pick_stage(layout: RunLayout[Path], narrator: Narrator, pair: tuple[str, str], search: SearchConfig) -> None:
    """Take what was chosen for a pair that has no label, write the merge, and only then measure it, beside what the
    selector picks (its safe choice, as `simmerge plan --left --right` says), every arm, both parents and the base."""
    from simmerge_ray.selector.planning.recommender import Recommender

    with narrator.stage("pick") as stage:
        config = {"pair": list(pair), "search": search.content(), "policy": "auto"}
        inputs = {"signals": digest_table(layout.signals), "selector": digest_file(layout.selector / "selector.json")}
        inputs |= {"choice": digest_file(choice_file(layout.choices, pair))}
        manifest = Manifest("pick", config, inputs, _PICK_SCHEMA)
        if manifest.is_current(layout.pick / "manifest.json"):
            stage.result = UNCHANGED
            return
        started = time.monotonic()
        catalogue, tasks = load_catalogue(layout.catalogue), load_tasks(layout.tasks)
        choice = read_choice(layout.choices, pair)
        recommender = Recommender.load(layout.selector, layout.signals)
        advice = recommender.recommend(*pair)
        resolved, told = resolve_plan(choice.answer, catalogue), {k: {"retention": v} for k, v in choice.keeps.items()}
        merged = write_pick(layout, resolved, told)
        pair_tasks = {task: tasks[task] for task in catalogue.tasks_of(pair)}
        arms = {ranked.arm: arm_plan(*pair, ranked.arm) for ranked in advice.ranked}
        plans = {"arms": arms, "chosen": {CHOSEN: choice.plan, ANSWER: choice.answer}}
        measured, loaded = measure_pick(layout, search, plans, merged, pair_tasks, narrator)
        write_pick(layout, resolved, told | _measured(layout, choice.answer))  # now the card can say what was measured
        result = {
            "pair": list(pair),
            "answer": {"label": choice.label, "plan": choice.answer.to_json(), "is_tuned": choice.is_tuned},
            "keeps": dict(choice.keeps),
            "arm": advice.choice.arm,
            "reason": advice.choice.reason,
            "overrode": advice.choice.overrode,
            "best_fixed": recommender.selector.best_fixed,
            "predicted": {r.arm: {"utility": r.utility, "sd": r.sd} for r in advice.ranked},
            "measured": measured,
            "loaded": loaded,
            "num_items": {name: len(task.items) for name, task in pair_tasks.items()},
        }
        write_json(layout.pick / "pick.json", result)
        manifest.write(layout.pick / "manifest.json", time.monotonic() - started, {"answer": choice.label})
        means = {kind: {one: mean(by.values()) for one, by in of.items()} for kind, of in measured.items()}
        parents = max(means["checkpoints"][name] for name in pair)
        stage.result = (
            f"{choice.label}, measured {means['chosen'][ANSWER]:.3f} (the selector's {advice.choice.arm} "
            f"{means['arms'][advice.choice.arm]:.3f}, better parent {parents:.3f}) -> {merged or layout.pick}"
        )


def write_pick(layout: RunLayout[Path], resolved: ResolvedPlan, told: Mapping[str, Any]) -> Place | None:
    """The plan file, and the merge; None where the answer is a checkpoint as it is: there is nothing to merge.
    told: see `write_merge`."""
    from simmerge_ray.merging.write.directory import write_merge

    if not resolved.plan.is_merge:
        shutil.rmtree(layout.pick / "merged", ignore_errors=True)  # of an earlier answer
        write_plan(layout.pick / "plan.json", resolved)
        return None
    write_plan(layout.pick / "plan.json", resolved, told)
    return write_merge(read_plan(layout.pick / "plan.json")[0], layout.pick / "merged", told).path


def _measured(layout: RunLayout[Path], plan: MergePlan) -> dict[str, dict[str, float]]:
    """Utility of a measured plan by task, for its card."""
    labels = [one for one in LabelStore(layout.pick / "labels").read() if one.plan == plan]
    return {
        one.task: {"measured": one.outcome.utility, "se": one.outcome.standard_error}
        for one in labels
        if isinstance(one.outcome, Measured)
    }


def measure_pick(
    layout: RunLayout[Path],
    search: SearchConfig,
    plans: Mapping[str, Mapping[str, MergePlan]],
    merged: Place | None,
    tasks: dict[str, Task],
    narrator: Narrator,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Utilities by task of the plans, and as `checkpoints` of their members and the base; and those of the written
    checkpoint as each library loads it: EngineError if it does not answer like the merge that was measured in memory.

    Args:
        plans: by kind and name; `chosen` has that of the written checkpoint.
    """
    from simmerge_ray.on_ray.merge_search import run_search

    catalogue = load_catalogue(layout.catalogue)
    assert catalogue.base is not None, "checked before the choice"
    config = search.model_copy(update={"exclude": (), "concurrency": 1})
    members = {member: None for of in plans.values() for plan in of.values() for member in plan.members}
    checkpoints = {name: MergePlan(source=name) for name in (*members, catalogue.base.id)}
    every = {**plans, "checkpoints": checkpoints}
    asked = {plan.id: plan for of in every.values() for plan in of.values()}
    store = (layout.pick / "labels").resolve()
    with ray_session(), ExitStack() as stack:
        if merged is not None:
            check = load_and_evaluate, str(merged.resolve()), tasks, search.evaluator
            checked = stack.enter_context(in_background(*check))
        with search_bar(narrator) as report:
            given = dict.fromkeys(asked.values(), sorted(tasks))
            found = run_search(catalogue, load_tasks(layout.tasks), config, store, given, report).search.labels()
        loaded = checked() if merged is not None else {}
    utilities = {
        plan.id: {task: label.outcome.utility for task, label in of.items() if isinstance(label.outcome, Measured)}
        for plan, of in found.items()
    }
    measured = {kind: {name: utilities[plan.id] for name, plan in of.items()} for kind, of in every.items()}
    for task, values in loaded.items():
        from_disk, in_memory = values[search.evaluator], measured["chosen"][ANSWER][task]
        if abs(from_disk - in_memory) > 2.0 / len(tasks[task].items):
            scores = f"{merged} scores {from_disk:.4f} on {task!r} from disk"
            raise EngineError(f"{scores}, but {in_memory:.4f} when it was merged in memory")
    return measured, loaded


def load_and_evaluate(path: str, tasks: dict[str, Task], evaluator: str) -> dict[str, dict[str, float]]:
    """Utility by task and library: transformers, and (if that is the evaluator) a new vLLM engine."""
    from simmerge_ray.checkpoints.references import CheckpointRef
    from simmerge_ray.search.evaluation import Evaluator
    from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator

    ref = CheckpointRef("merged", Path(path))
    evaluators: list[Evaluator] = [TransformersEvaluator(ref)]
    if evaluator == "vllm":
        from simmerge_ray.on_ray.vllm_evaluator import VllmEvaluator

        evaluators.append(VllmEvaluator(ref, max_model_len=128))
    return {
        name: {engine.name: float(task.evaluate(engine).mean()) for engine in evaluators}
        for name, task in tasks.items()
    }


def closing_lines(layout: RunLayout[Path]) -> list[str]:
    """Where everything lies, and what to try next."""
    pick = read_json(layout.pick / "pick.json")
    left, right = pick["pair"]
    merged = layout.pick / "merged"
    return [
        "",
        f"report             {layout.report / 'report.html'}",
        f"merged checkpoint  {merged if merged.exists() else 'none: keep ' + pick['answer']['label']}",
        f"selector           {layout.selector}",
        f"labels             {layout.labels}",
        f"log of libraries   {layout.log}",
        "",
        "next: choose without labels; leave out the members to choose among all checkpoints:",
        f"  {program()} auto {layout.catalogue} --probes {layout.probes} --member {left} --member {right} "
        f"--signatures {layout.signals.parent / 'signatures'} --evaluator transformers --out runs/auto",
        "or serve the selector; it prints the dashboard's link and a curl line, with the token that it takes:",
        f"  {program()} serve {layout.root}",
    ]
