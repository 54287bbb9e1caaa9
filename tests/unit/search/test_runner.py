"""Trials one after the other in this process: labels, resume, infeasible merges, evaluators that cannot be trusted."""

from __future__ import annotations

import shutil

import pytest
import torch

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import EngineError, InputError, OutputError
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.plans.operators.specs import make_arm, parse_arm
from simmerge_ray.plans.plan import MergePlan, pair_plan
from simmerge_ray.plans.recipe import GroupWeights, recipe_of
from simmerge_ray.search.evaluation import Evaluator, load_tasks
from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator
from simmerge_ray.search.labels import Infeasible, LabelStore, Measured
from simmerge_ray.search.runner import TrialRunner, copy_labels
from simmerge_ray.search.setup import PreparedSearch, Trial, grid_trials, prepare_search
from simmerge_ray.search.status import NUM_ALIKE, SearchStatus
from tests import tiny

ARMS = ("linear", "ties(density=0.2)")
LOCAL = SearchConfig(arms=ARMS, evaluator="transformers")
# Between these checkpoints SLERP is the linear average below its first threshold, and has an arc below the second.
CLOSE, APART = "slerp(threshold=0.5)", "slerp(threshold=1)"


@pytest.fixture
def tasks(catalogue_path):
    return load_tasks(catalogue_path.parent / "tasks")


def start_reference(search: PreparedSearch) -> Evaluator:
    return TransformersEvaluator(search.template, "float32", max_model_len=search.settings.max_model_len)


def grid(catalogue, tasks, uri, **changes) -> tuple[PreparedSearch, list[Trial]]:
    study = prepare_search(catalogue, tasks, LOCAL.model_copy(update=changes), str(uri))
    return study, grid_trials(study)


def run_here(catalogue, tasks, uri) -> list:
    """Run what is missing, in this process; returns the trials that were run."""
    study, trials = grid(catalogue, tasks, str(uri))
    runner = TrialRunner(study, start_reference)
    for trial in trials:
        runner.run(trial)
    return trials


def test_a_search_goes_on_from_the_labels_that_are_there(catalogue, tasks, tmp_path):
    run_here(catalogue, tasks, tmp_path / "whole")
    whole = LabelStore(tmp_path / "whole").read()
    part = LabelStore(tmp_path / "part")
    part.append(whole[:5])
    part.append(whole[5:9])
    assert 0 < len(run_here(catalogue, tasks, tmp_path / "part")) < 8
    again = part.read()
    assert [(one.key, one.outcome.items.tolist()) for one in again] == [
        (one.key, one.outcome.items.tolist()) for one in whole
    ]


def test_tasks_of_the_same_items_share_their_labels(catalogue, tasks, tmp_path):
    twice = tasks | {"again": tasks["add"]}
    trials = run_here(catalogue, twice, tmp_path)
    assert {name for one in trials for name in one.tasks} == set(twice)
    search, missing = grid(catalogue, twice, tmp_path)
    assert missing == []
    found = search.labels()[MergePlan(source="base")]
    assert set(found) == set(twice) and found["again"].outcome is found["add"].outcome
    renamed, missing = grid(catalogue, tasks | {"sums": tasks["add"]}, tmp_path)
    assert missing == [] and set(renamed.labels()[MergePlan(source="base")]) == {*tasks, "sums"}


class FakeEvaluator:
    """Answers everything with `answer`; fails at the loads whose numbers are in `failures`."""

    name = "fake"

    def __init__(self, failures: dict[int, Exception]) -> None:
        self.num_loads, self.failures = 0, failures
        self.tokenizer = lambda texts, add_special_tokens: {"input_ids": [[0]] * len(texts)}

    def load(self, resolved) -> None:
        self.num_loads += 1
        if error := self.failures.get(self.num_loads):
            raise error

    def generate(self, prompts, max_new_tokens, stop=()):
        return ["a"] * len(prompts)


def run_trials(catalogue, tasks, path, failures) -> tuple[list, int]:
    """Run all trials in this process; returns the labels and how many evaluators were started."""
    started: list[FakeEvaluator] = []

    def start(study: PreparedSearch) -> FakeEvaluator:
        started.append(FakeEvaluator(failures if not started else {}))
        return started[-1]

    study, trials = grid(catalogue, tasks, path)
    runner = TrialRunner(study, start)
    for trial in trials:
        runner.run(trial)
    return LabelStore(path).read(), len(started)


def test_a_failed_swap_discards_the_engine_and_the_trial_is_tried_once_more(catalogue, tasks, tmp_path):
    labels, num_started = run_trials(catalogue, tasks, tmp_path, {3: EngineError("half-loaded")})
    assert num_started == 2
    assert all(isinstance(label.outcome, Measured) for label in labels) and len(labels) == 16


def test_a_trial_that_fails_twice_is_infeasible_with_its_reason(catalogue, tasks, tmp_path):
    class Failing(FakeEvaluator):
        def load(self, resolved) -> None:
            if resolved.plan.label.startswith("ties"):
                raise RuntimeError("out of memory")

    study, trials = grid(catalogue, tasks, tmp_path)
    runner = TrialRunner(study, lambda study: Failing({}))
    results = [runner.run(trial).infeasible for trial in trials]
    assert results.count("RuntimeError: out of memory") == 2 and results.count(None) == len(trials) - 2
    reasons = {label.outcome.reason for label in LabelStore(tmp_path).read() if isinstance(label.outcome, Infeasible)}
    assert reasons == {"RuntimeError: out of memory"}


def test_a_merge_that_is_not_finite_is_infeasible(catalogue, tasks, tmp_path, catalogue_path):
    root = tmp_path / "zoo"
    shutil.copytree(catalogue_path.parent, root)
    model = tiny.make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    tiny.save(model, root / "m1")
    study, trials = grid(load_catalogue(root / "catalogue.yaml"), tasks, tmp_path / "labels")
    trial = next(trial for trial in trials if trial.plan.label == "linear: m0 + m1")
    assert "holds NaN" in (TrialRunner(study, start_reference).run(trial).infeasible or "")
    (label, *_) = LabelStore(tmp_path / "labels").read()
    assert isinstance(label.outcome, Infeasible) and "model.norm.weight holds NaN" in label.outcome.reason


def run_arms(catalogue, tasks, path, arms) -> tuple[PreparedSearch, list, list, FakeEvaluator]:
    """Run the trials of some arms in this process; returns the trials, how each ended, and the evaluator."""
    evaluator = FakeEvaluator({})
    study, trials = grid(catalogue, tasks, path, arms=arms)
    runner = TrialRunner(study, lambda study: evaluator)
    return study, trials, [runner.run(trial) for trial in trials], evaluator


def test_an_arm_that_is_the_same_merge_is_not_evaluated_and_its_label_says_so(catalogue, tasks, tmp_path):
    _, trials, results, evaluator = run_arms(catalogue, tasks, tmp_path, ("linear", CLOSE, APART))
    num_pairs, num_singles = 2, 4
    assert evaluator.num_loads == num_singles + 2 * num_pairs and len(trials) == num_singles + 3 * num_pairs
    assert all(result.rival is None for result in results)
    labels = {(label.plan.label, label.task): label for label in LabelStore(tmp_path).read()}
    assert len(labels) == 2 * len(trials)
    for (plan, task), label in labels.items():
        if plan.startswith(CLOSE):
            other = labels[plan.replace(CLOSE, "linear"), task]
            assert label.same_as == other.plan.label and label.outcome.items.tolist() == other.outcome.items.tolist()
        else:
            assert label.same_as is None
    assert grid(catalogue, tasks, tmp_path, arms=("linear", CLOSE))[1] == []


def test_a_trial_waits_for_the_labels_of_the_same_merge(catalogue, tasks, tmp_path):
    study, trials, results, evaluator = run_arms(catalogue, tasks, tmp_path, (CLOSE, "linear"))
    waiting = [trial for trial, result in zip(trials, results, strict=True) if result.rival is not None]
    assert [trial.plan.steps[0].arm.label for trial in waiting] == [CLOSE] * 2
    assert evaluator.num_loads == len(trials) - 2
    store = LabelStore(tmp_path)
    for trial in waiting:
        outcomes = copy_labels(study, store, trial, trial.rivals[0], 0.0)
        assert outcomes is not None and len(outcomes) == 2
    assert len(store.read()) == 2 * len(trials)
    lonely = (tmp_path / "other", ("slerp(threshold=0.6)", CLOSE))  # no linear arm: the first is evaluated
    _, trials, results, evaluator = run_arms(catalogue, tasks, *lonely)
    assert evaluator.num_loads == len(trials) - 2 and all(result.rival is None for result in results)


def test_recipes_are_labelled_once_and_read_back_as_any_plan(catalogue, tasks, tmp_path):
    """With the real evaluator: a pair's arm has its label already, groups and gradients are kept, what falls back is
    the linear recipe."""
    weights = {"m0": GroupWeights((("layers.1.", 0.2),), 0.9), "m1": (0.1, 0.8), "m2": 0.4}
    recipes = [
        recipe_of(make_arm("task_arithmetic"), weights),
        recipe_of(make_arm("linear"), {"m0": 1.0, "m1": 1.0}),  # an arm on a pair
        recipe_of(make_arm("linear"), {"m0": 0.6, "m1": 0.4}),
        recipe_of(parse_arm(CLOSE), {"m0": 0.6, "m1": 0.4}),
    ]
    plans = [pair_plan("m0", "m1", make_arm("linear")), *(MergePlan(recipe=one) for one in recipes)]
    study, _ = grid(catalogue, tasks, tmp_path)
    first = grid_trials(study, plans[:1])
    runner = TrialRunner(study, start_reference)
    for trial in first:
        runner.run(trial)
    trials = grid_trials(study, plans)
    assert [trial.plan for trial in trials] == [plans[1], *plans[3:], MergePlan(source="m2")]
    assert [Trial.from_text(trial.to_text()) for trial in trials] == trials
    for trial in trials:
        assert runner.run(trial).infeasible is None
    assert grid_trials(study, plans) == []
    labels = {(label.plan, label.task): label for label in LabelStore(tmp_path).read()}
    assert len(labels) == 2 * (3 + 4) and {plan for plan, _ in labels} >= {plans[0], plans[1], *plans[3:]}
    assert {label.same_as for label in labels.values()} == {None, plans[3].label}
    assert labels[plans[4], "add"].outcome.items.tolist() == labels[plans[3], "add"].outcome.items.tolist()
    (other, known) = (labels[plan, "copy"] for plan in (plans[1], plans[0]))
    assert set(other.checkpoints) == {"base", "m0", "m1", "m2"} and set(known.checkpoints) == {"m0", "m1"}


def test_what_cannot_be_searched_is_refused_before_ray_starts(catalogue, tasks, tmp_path):
    def refuse(message, tasks=tasks, **changes):
        with pytest.raises(InputError, match=message):
            grid(catalogue, tasks, tmp_path, **changes)

    refuse("unknown task 'copy'.*known: add", tasks={"add": tasks["add"]})
    refuse("unknown checkpoint 'm9'", exclude=(("m0", "m9"),))
    refuse("no cross-task pairs", exclude=(("m0", "m1"), ("m2", "m1")))
    refuse("max_model_len is 200; the checkpoints' own limit is 128", max_model_len=200)
    refuse(r"task 'add', item 3: prompt and answer take \d+ tokens, the engine holds 8", max_model_len=8)
    refuse(r"(?s)objective 'add=x'.*unknown operator 'tise'.*the engine holds 8",
           max_model_len=8, objectives=("add=x",), arms=("tise",))  # fmt: skip


def test_a_label_that_cannot_be_written_is_no_failure_of_the_merge(catalogue, tasks):
    study, trials = grid(catalogue, tasks, "/sys/kernel/labels")
    started = []
    runner = TrialRunner(study, lambda search: started.append(1) or start_reference(search))
    with pytest.raises(OutputError, match="labels cannot be written to /sys/kernel/labels: "):
        runner.run(trials[0])
    assert started == [1]  # and it is not evaluated a second time


def test_trials_that_all_fail_alike_are_told_from_those_that_do_not():
    failures = [(f"m{i}", f"merge 'm{i}': actor {i} at 0x7f0{i} ran out of memory") for i in range(NUM_ALIKE)]
    assert SearchStatus(9, 4, 4, failures=failures[:4]).hopeless is None
    assert "the first 5 merges all failed alike" in (SearchStatus(9, 5, 5, failures=failures).hopeless or "")
    assert SearchStatus(9, 6, 5, failures=failures).hopeless is None  # one was measured
    assert SearchStatus(9, 5, 5, failures=[*failures[:4], ("m4", "a tensor is missing")]).hopeless is None
