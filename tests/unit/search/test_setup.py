"""A prepared search: its problems and its needs before it starts, what a trial refuses, and what it found."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.merging.compile import compile_plan
from simmerge_ray.merging.write.card import model_card
from simmerge_ray.pipelines.dataset import write_best
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, pair_plan, read_plan
from simmerge_ray.plans.recipe import recipe_of
from simmerge_ray.search.estimate import engine_bytes, estimate_search
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.search.evaluation.answers import AnswersTask
from simmerge_ray.search.labels import Infeasible, LabelStore, Measured
from simmerge_ray.search.runner import TrialRunner
from simmerge_ray.search.setup import grid_trials, prepare_search
from simmerge_ray.search.summary import comparisons, ranked_results
from tests import tiny

CONFIG = SearchConfig(arms=("linear", "ties"), evaluator="transformers")


@pytest.fixture
def root(catalogue_path, tmp_path) -> Path:
    shutil.copytree(catalogue_path.parent, tmp_path / "zoo")
    return tmp_path / "zoo"


def write_study(root: Path, **changes) -> Path:
    study = {"catalogue": "catalogue.yaml", "probes": "probes", "tasks": "tasks", "out": "out"}
    study |= {"search": CONFIG.content() | {"exclude": []}} | changes
    (root / "study.yaml").write_text(yaml.safe_dump(study))
    return root / "study.yaml"


def test_a_study_says_all_of_its_problems_at_once(root):
    from simmerge_ray.pipelines.stages import load_dataset_config

    lines = [json.dumps({"prompt": "a=", "target": "b"}), json.dumps({"prompt": "c="})]
    (root / "tasks" / "bad.jsonl").write_text("\n".join(lines))
    (root / "tasks" / "empty.jsonl").write_text("")
    (root / "probes" / "add.jsonl").write_text('{"txt": "a"}\n')
    search = {"arms": ["linear"], "evaluator": "transformers", "concurency": 2}
    with pytest.raises(ConfigError) as caught:
        load_dataset_config(write_study(root, search=search, singals={}))
    message = str(caught.value)
    for part in (
        "unknown key 'singals' (did you mean 'signals'?)",
        "unknown key 'search.concurency' (did you mean 'concurrency'?)",
        "bad.jsonl:\n", "line 2: an item needs a non-empty string under 'target'", "empty.jsonl:\n", "holds no items",
        "add.jsonl, line 1: a probe needs",
    ):  # fmt: skip
        assert part in message, part
    assert not (root / "out").exists()


def test_what_the_tasks_need_is_said_with_the_objectives_and_arms(root):
    from simmerge_ray.pipelines.stages import load_dataset_config

    search = {"arms": ["tise"], "evaluator": "transformers", "max_model_len": 8, "objectives": ["maths"]}
    with pytest.raises(ConfigError) as caught:
        load_dataset_config(write_study(root, search=search))
    for part in ("unknown operator 'tise'", "unknown task 'maths'", "the engine holds 8 (max_model_len)"):
        assert part in str(caught.value)


def test_an_unknown_task_of_the_catalogue_is_named(root):
    from simmerge_ray.pipelines.stages import load_dataset_config

    (root / "tasks" / "copy.jsonl").unlink()
    with pytest.raises(ConfigError, match="unknown task 'copy'.*known: add"):
        load_dataset_config(write_study(root))


def test_a_dry_run_says_what_a_study_takes_and_starts_nothing(root, run_job_script):
    code, _, text = run_job_script("build_dataset", write_study(root), "--dry-run")
    assert code == 0
    assert "trials   8 to run, 0 labels" in text and "GB together" in text and "unknown until" in text
    assert not (root / "out").exists()


def test_the_command_line_says_what_a_search_takes(root, simmerge):
    options = (
        "--tasks tasks --out labels --budget 7 --dry-run --evaluator transformers --ways 2-3 --arm linear --arm ties "
        "--objective add --objective worst"
    )
    result = simmerge("search", "catalogue.yaml", *options.split(), cwd=root)
    assert result.returncode == 0 and "trials   11 to run" in result.stdout
    result = simmerge("search", "catalogue.yaml", "--out", "labels", "--ways", "two", cwd=root)
    assert result.returncode == 2 and "--ways: ways is a number of checkpoints or a range" in result.stderr


def prepared(root: Path, **changes):
    catalogue, tasks = load_catalogue(root / "catalogue.yaml"), load_tasks(root / "tasks")
    return prepare_search(catalogue, tasks, CONFIG.model_copy(update=changes), str(root / "labels"))


class Constant:
    """Answers everything alike."""

    name = "constant"
    max_model_len = 64

    def __init__(self) -> None:
        self.tokenizer = lambda texts, add_special_tokens: {"input_ids": [[0]] * len(texts)}

    def load(self, resolved) -> None:
        pass

    def generate(self, prompts, max_new_tokens, stop=()):
        return ["a"] * len(prompts)


def test_checkpoints_that_no_longer_fit_are_infeasible_and_the_search_goes_on(root):
    search = prepared(root)
    trials = grid_trials(search)
    tiny.write_tokenizer(root / "m1", tiny.CHARACTERS[::-1])  # a new upload under the old name, after the check
    runner = TrialRunner(search, lambda search: Constant())
    ends = {trial.plan.label: runner.run(trial).infeasible for trial in trials}
    refused = {label for label, reason in ends.items() if reason}
    assert refused == {trial.plan.label for trial in trials if trial.plan.steps and "m1" in trial.plan.members}
    assert all("tokenizer" in reason for reason in ends.values() if reason)
    assert sum(isinstance(label.outcome, Infeasible) for label in LabelStore(search.labels_uri).read()) == 2 * len(
        refused
    )


def test_infeasible_merges_are_tried_again_on_demand(root):
    search = prepared(root)
    trial = next(trial for trial in grid_trials(search) if trial.plan.steps)
    store = LabelStore(search.labels_uri)
    store.append([search.label(trial.plan, task, Infeasible("out of memory"), 0.0) for task in trial.tasks])
    assert trial not in grid_trials(search)
    assert trial in grid_trials(prepared(root, retry_infeasible=True))


def test_given_plans_are_measured_on_the_tasks_beside_them(root):
    """And so are their parents; a scaled checkpoint names one task itself."""
    search = prepared(root)
    scaled = MergePlan(recipe=recipe_of(make_arm("task_arithmetic"), {"m0": 0.5}))
    assert len(search.tasks_of(scaled)) == 1
    tasks = tuple(sorted(search.tasks))
    trials = grid_trials(search, {scaled: tasks})
    assert [(trial.plan, trial.tasks) for trial in trials] == [(scaled, tasks), (MergePlan(source="m0"), tasks)]


def test_shards_add_up_to_the_whole(root):
    search = prepared(root)
    trial = next(trial for trial in grid_trials(search) if trial.plan.steps)
    runner = TrialRunner(search, lambda search: Constant())
    whole = runner.run(trial).utilities
    runner.begin(replace(trial, num_shards=3))
    steps = [runner.step() for _ in range(3)]
    assert [step.finished for step in steps] == [False, False, True]
    assert steps[-1].utilities == whole and sum(step.num_new for step in steps) == sum(
        search.tasks[task].num_items for task in trial.tasks
    )
    assert len(steps[0].items["add"]) < len(steps[1].items["add"]) < search.tasks["add"].num_items


def test_what_was_found_stands_in_the_order_of_the_objective(root):
    search = prepared(root, budget=9, objectives=("add",))
    trials = grid_trials(prepared(root))
    store = LabelStore(search.labels_uri)
    for number, trial in enumerate(trials):
        items = np.full(4, number / 10)
        store.append([search.label(trial.plan, task, Measured(items), 1.0) for task in trial.tasks])
    merges, singles = ranked_results(search)
    assert [one.values[0] for one in merges] == sorted((one.values[0] for one in merges), reverse=True)
    assert merges[0].best and not any(one.best for one in merges[1:]) and len(singles) == 4
    told = estimate_search(search, 10, engines=2)
    assert told.seconds == pytest.approx(12 + 10 * 2.0 / 2) and told.engines == 2
    assert "about 22 s" in told.lines()[-1]


def test_the_best_merge_is_a_plan_file_that_can_be_merged(root, tmp_path):
    search = prepared(root, budget=9, objectives=("add",), arms=("linear",))
    recipe = MergePlan(recipe=recipe_of(make_arm("ties"), {"m0": (0.2, 0.9), "m2": 1.1}))
    plans = [MergePlan(source="m0"), pair_plan("m0", "m1", make_arm("linear")), recipe]
    store, said = LabelStore(search.labels_uri), StringIO()
    for number, plan in enumerate(plans):
        store.append([search.label(plan, "add", Measured(np.full(4, number / 10)), 1.0)])
    write_best(search, tmp_path / "found", Narrator(Console(file=said, width=200)))
    first, second, third = said.getvalue().splitlines()[:3]
    assert first == "add of add:"  # the verdict comes before any table
    assert second.startswith(f"answer: merge {recipe.label}, 0.200 ± 0.000 on 2 items of each task")
    assert third.startswith("against the best checkpoint, m0: +0.200")
    resolved, predicted = read_plan(tmp_path / "found" / "best.plan.json")
    assert resolved.plan == recipe
    card = model_card(compile_plan(resolved), predicted)
    assert recipe.label in card and "| add | 0.200 | 0.000 |" in card and "measured utility" in card
    rows = json.loads((tmp_path / "found" / "best.json").read_text())
    assert [len(rows[kind]) for kind in ("merges", "singles")] == [2, 1]


def test_merges_that_are_run_over_answers_bring_no_parents_with_them(root):
    """What a parent keeps is asked for as a plan of its own; most often it is known."""
    catalogue = load_catalogue(root / "catalogue.yaml")
    answers = AnswersTask("m0 to add", [([2, 3], [4, 5])])
    config = SearchConfig(evaluator="transformers", pairs="all")
    search = prepare_search(
        replace(catalogue, own_task=dict.fromkeys(catalogue.ids)), {answers.name: answers}, config,
        str(root / "labels"), plans_given=True,
    )  # fmt: skip
    merge, parent = pair_plan("m0", "m1", make_arm("linear")), MergePlan(source="m0")
    assert [trial.plan for trial in grid_trials(search, [merge])] == [merge]
    assert [trial.plan for trial in grid_trials(search, [parent, merge])] == [parent, merge]


def test_merges_and_checkpoints_of_a_grid_are_compared_on_the_same_tasks(root, tmp_path):
    """A merge on one task beside a checkpoint on two says nothing: what is compared is on the merge's own tasks."""
    search, said = prepared(root, pairs="all"), StringIO()
    store, merge = LabelStore(search.labels_uri), pair_plan("m0", "m2", make_arm("linear"))
    utilities = {"m0": (0.55, 0.0), "m2": (0.3, 0.9), "base": (0.6, 0.0)}
    for name, values in utilities.items():
        for task, value in zip(("add", "copy"), values, strict=True):
            store.append([search.label(MergePlan(source=name), task, Measured(np.full(4, value)), 1.0)])
    for task in search.tasks_of(merge):
        store.append([search.label(merge, task, Measured(np.full(4, 0.5)), 1.0)])
    content = write_best(search, tmp_path, Narrator(Console(file=said, width=200)))
    (verdict,) = content["verdicts"]
    assert verdict["tasks"] == list(search.tasks_of(merge)) == ["add"]
    assert verdict["answer"] == "do not merge: keep the base, base, as it is"  # over both tasks m2 and m0 would lead
    assert verdict["utility"]["value"] == pytest.approx(0.6)
    assert "the best merge, linear: m0 + m2, against it: -0.100" in said.getvalue()
    only_add = prepared(root, budget=9, objectives=("add",))
    merges, singles = ranked_results(only_add)
    (compared,) = comparisons(only_add, merges, singles)
    assert compared.tasks == ("add",) and compared.verdict.answer == "do not merge: keep the base, base, as it is"


def test_labels_of_one_merge_in_several_words_are_together(root):
    search = prepared(root, budget=9)
    store = LabelStore(search.labels_uri)
    recipe = MergePlan(recipe=recipe_of(make_arm("linear"), {"m1": 0.7, "m0": 0.7}))
    for plan, task in ((pair_plan("m0", "m1", make_arm("linear")), "add"), (recipe, "copy")):
        store.append([search.label(plan, task, Measured(np.full(4, 0.5)), 1.0)])
    ((plan, labels),) = search.labels().items()
    assert plan.id == recipe.id and set(labels) == {"add", "copy"} and len(ranked_results(search)[0]) == 1


def test_an_engine_takes_its_weights_twice_and_what_it_holds_besides(catalogue):
    sizes = {dtype: engine_bytes(catalogue.base, "transformers", dtype) for dtype in ("float32", "bfloat16")}
    elements = (sizes["float32"] - sizes["bfloat16"]) / 4
    assert elements == sum(parameter.numel() for parameter in tiny.make_model().parameters())


def test_engines_are_as_many_as_cores_gpus_or_memory_allow(root):
    from simmerge_ray.capacity.engines import engines_that_fit

    size = engine_bytes(load_catalogue(root / "catalogue.yaml").base, "transformers", "float32")
    assert engines_that_fit(prepared(root), {"CPU": 8.0, "memory": 5.5 * size}) == 5
    assert engines_that_fit(prepared(root, concurrency=2), {"CPU": 8.0, "memory": 5.5 * size}) == 2
    assert engines_that_fit(prepared(root, cpus_per_trial=3.0), {"CPU": 8.0, "memory": 5.5 * size}) == 2
    on_gpus = {"gpus_per_trial": 0.5, "tensor_parallel": 2, "cpus_per_trial": 1.0}
    assert engines_that_fit(prepared(root, **on_gpus), {"CPU": 16.0, "GPU": 4.0, "memory": size}) == 4
    assert engines_that_fit(prepared(root, **on_gpus), {"CPU": 16.0}) == 1  # waits for its node


def test_a_search_starts_as_many_engines_as_it_was_told_since_the_cluster_may_grow(root):
    from simmerge_ray.capacity.engines import num_engines

    on_the_head = {"CPU": 0.0, "memory": 8e9}
    assert num_engines(prepared(root, concurrency=3), on_the_head) == 3
    assert num_engines(prepared(root), on_the_head) == 1  # which waits for its node
    assert num_engines(prepared(root), {"CPU": 2.0, "memory": 64e9}) == 2


def test_an_engine_asks_for_its_memory_or_for_a_gpu_that_holds_it(root):
    from simmerge_ray.on_ray.merge_search import trial_resources

    size = engine_bytes(load_catalogue(root / "catalogue.yaml").base, "transformers", "float32")
    assert trial_resources(prepared(root)).bundles == [{"CPU": 1.0, "memory": size}]
    two_ranks = {"cpus_per_trial": 2.0, "tensor_parallel": 2}
    assert trial_resources(prepared(root, **two_ranks)).bundles == [{"CPU": 4.0, "memory": size}]
    on_gpus = {"gpus_per_trial": 0.5, "tensor_parallel": 2}
    assert trial_resources(prepared(root, **on_gpus), ["GPU"]).bundles == [{"CPU": 2.0, "GPU": 1.0}]
    sized = trial_resources(prepared(root, **on_gpus), ["gpu_sizes"]).bundles
    assert sized == [{"CPU": 2.0, "GPU": 1.0, "gpu_16gb": 1.0}]
    over_nodes = trial_resources(prepared(root, executor="ray", **on_gpus), ["gpu_24gb"]).bundles
    assert over_nodes == [{"CPU": 1}, *[{"GPU": 0.5, "gpu_16gb": 0.5}] * 2]
