"""`make demo`: every stage of the chain on the demo zoo, then a pick for a pair whose labels were never made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from simmerge_ray.base.config import SearchConfig, SignalsConfig, TrainConfig
from simmerge_ray.base.errors import EngineError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.base.storage import Manifest, Place, digest_file, read_json, write_json
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.on_ray.resources import ray_session
from simmerge_ray.on_ray.tasks import in_background
from simmerge_ray.pipelines.dataset import UNCHANGED, search_bar, search_stage
from simmerge_ray.pipelines.stages import signals_stage, train_stage
from simmerge_ray.plans.keeping import arm_plan, keep_label
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import read_plan, resolve_plan, write_plan
from simmerge_ray.research.zoo.recipe import ARMS, EXPERT_RECIPES, ExpertRecipe
from simmerge_ray.search.evaluation import Task, load_tasks
from simmerge_ray.search.labels import LabelStore, Measured

HELD_OUT_PAIR = ("math-strong", "rag-strong")
# The vocabulary has 150 entries: many positions cost little.
SIGNALS = SignalsConfig(num_positions=512, num_attention_positions=128)


def run_demo(
    layout: RunLayout[Path],
    narrator: Narrator,
    recipes: Sequence[ExpertRecipe] = EXPERT_RECIPES,
    held_out: tuple[str, str] = HELD_OUT_PAIR,
    num_items: int | None = None,
    train: TrainConfig | None = None,
    evaluator: str = "vllm",
) -> None:
    """All stages in `layout.root`; what is current is not computed again, so after an error the next call goes on."""
    arms = tuple(make_arm(operator, params).label for operator, params in ARMS)
    search = SearchConfig(arms=arms, exclude=(held_out,), evaluator=evaluator)
    # One cluster for all stages of a first run; none for a run that finds everything in place.
    with nullcontext() if (layout.pick / "pick.json").exists() else ray_session():
        zoo_stage(layout, narrator, recipes, num_items)
        signals_stage(layout.catalogue, layout.probes, layout.signals, SIGNALS, narrator)
        search_stage(layout.catalogue, layout.tasks, layout.labels, search, narrator)
        train_stage(
            layout.signals, layout.labels, layout.selector, train or TrainConfig(), narrator, arms, layout.crossval
        )
        pick_stage(layout, narrator, held_out, search)
    with narrator.stage("report") as stage:
        from simmerge_ray.reports.run import write_report

        stage.result = f"-> {write_report(layout)}"


def zoo_stage(
    layout: RunLayout[Path],
    narrator: Narrator,
    recipes: Sequence[ExpertRecipe] = EXPERT_RECIPES,
    num_items: int | None = None,
) -> None:
    """Train what is missing of the zoo."""
    from simmerge_ray.pipelines.zoo import MAX_NEW_TOKENS, NUM_ITEMS, NUM_PROBES, make_zoo

    with narrator.stage("zoo") as stage:
        config = {"num_items": num_items or NUM_ITEMS, "num_probes": NUM_PROBES, "max_new_tokens": MAX_NEW_TOKENS}
        manifest = Manifest("zoo", config, {recipe.name: recipe.digest() for recipe in recipes})
        path = layout.zoo / "zoo.json"
        if manifest.is_current(path) and all((layout.zoo / r.name / "recipe.json").exists() for r in recipes):
            stage.result = UNCHANGED
            return
        started = time.monotonic()
        with narrator.bar("experts trained") as report:
            num_trained = make_zoo(layout.zoo, recipes, config["num_items"], report=report)
        load_catalogue(layout.catalogue)
        manifest.write(path, time.monotonic() - started, {"num_trained": num_trained})
        stage.result = f"{num_trained} experts trained, {len(recipes)} in all -> {layout.catalogue}"


def pick_stage(layout: RunLayout[Path], narrator: Narrator, pair: tuple[str, str], search: SearchConfig) -> None:
    """Choose an arm (the selector's safe choice, as `simmerge plan --left --right` says) for a pair that has no label,
    write the merge, and only then measure it and the other arms."""
    from simmerge_ray.selector.planning.recommender import Recommender

    with narrator.stage("pick") as stage:
        config = {"pair": list(pair), "search": search.content(), "policy": "safe"}
        inputs = {"signals": digest_file(layout.signals), "selector": digest_file(layout.selector / "selector.json")}
        manifest = Manifest("pick", config, inputs)
        if manifest.is_current(layout.pick / "manifest.json"):
            stage.result = UNCHANGED
            return
        from simmerge_ray.merging.write.directory import write_merge

        started = time.monotonic()
        catalogue, tasks = load_catalogue(layout.catalogue), load_tasks(layout.tasks)
        recommender = Recommender.load(layout.selector, layout.signals)
        answer = recommender.recommend(*pair)
        arm, predicted = answer.choice.arm, answer.chosen.predicted
        write_plan(layout.pick / "plan.json", resolve_plan(arm_plan(*pair, arm), catalogue), predicted)
        resolved, _ = read_plan(layout.pick / "plan.json")
        merged = write_merge(resolved, layout.pick / "merged", predicted).path
        pair_tasks = {task: tasks[task] for task in catalogue.pair_tasks(*pair)}
        plans = [plan for r in answer.ranked if (plan := arm_plan(*pair, r.arm)).is_merge]  # parents: measured anyway
        measured, loaded = measure_pick(layout, search, plans, arm, merged, pair_tasks, narrator)
        result = {
            "pair": list(pair),
            "arm": arm,
            "reason": answer.choice.reason,
            "overrode": answer.choice.overrode,
            "best_fixed": recommender.selector.best_fixed,
            "predicted": {r.arm: {"utility": r.utility, "sd": r.sd} for r in answer.ranked},
            "measured": measured,
            "loaded": loaded,
            "num_items": {name: len(task.items) for name, task in pair_tasks.items()},
        }
        write_json(layout.pick / "pick.json", result)
        manifest.write(layout.pick / "manifest.json", time.monotonic() - started, {"arm": arm})
        means = {arm: sum(by_task.values()) / len(by_task) for arm, by_task in measured["arms"].items()}
        stage.result = (
            f"{arm} for {pair[0]} + {pair[1]} (predicted {answer.chosen.utility:.3f}, "
            f"measured {means[arm]:.3f}, best of all arms {max(means.values()):.3f}) -> {merged}"
        )


def measure_pick(
    layout: RunLayout[Path],
    search: SearchConfig,
    plans: Sequence[Any],
    picked: str,
    merged: Place,
    tasks: dict[str, Task],
    narrator: Narrator,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Utilities of the pair by every arm, the kept parents among them, and of its parents by name, and of the written
    checkpoint (by the arm `picked`) as each library loads it; EngineError if it does not answer like what was measured
    in memory."""
    from simmerge_ray.on_ray.merge_search import run_search

    catalogue, every_task = load_catalogue(layout.catalogue), load_tasks(layout.tasks)
    config = search.model_copy(update={"exclude": (), "concurrency": 1})
    store = (layout.pick / "labels").resolve()
    check = load_and_evaluate, str(merged.resolve()), tasks, search.evaluator
    with ray_session(), in_background(*check) as checked:
        with search_bar(narrator) as report:
            run_search(catalogue, every_task, config, store, plans, report)
        loaded = checked()
    arms: dict[str, dict[str, float]] = {}
    parents: dict[str, dict[str, float]] = {}
    for label in LabelStore(store).read():
        if isinstance(label.outcome, Measured) and label.task in tasks:
            source = label.plan.source
            name, rows = (source, parents) if source else (label.plan.steps[0].arm.label, arms)
            rows.setdefault(name, {})[label.task] = label.outcome.utility
    arms |= {keep_label(name): parents[name] for name in plans[0].members}
    for task, values in loaded.items():
        from_disk, in_memory = values[search.evaluator], arms[picked][task]
        if abs(from_disk - in_memory) > 2.0 / len(tasks[task].items):
            scores = f"{merged} scores {from_disk:.4f} on {task!r} from disk"
            raise EngineError(f"{scores}, but {in_memory:.4f} when it was merged in memory")
    return {"arms": arms, "parents": parents}, loaded


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
    return [
        "",
        f"report             {layout.report / 'report.md'}",
        f"merged checkpoint  {layout.pick / 'merged'}",
        f"selector           {layout.selector}",
        f"labels             {layout.labels}",
        f"log of libraries   {layout.log}",
        "",
        "next: serve the selector, and ask it from another terminal:",
        f"  .venv/bin/simmerge serve {layout.root}",
        "  curl -s -X POST http://127.0.0.1:8000/v1/decisions -H 'content-type: application/json' "
        f'-d \'{{"left": "{left}", "right": "{right}"}}\'',
    ]
