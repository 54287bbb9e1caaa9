"""The search on Ray Tune with real engines: labels, resume, infeasible merges, and engines that cannot be trusted."""

from __future__ import annotations

import re
import shutil
import time
import urllib.request

import pytest
import torch

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import EngineError, InputError
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.on_ray.engines import start_evaluator
from simmerge_ray.on_ray.merge_search import run_search
from simmerge_ray.plans.plan import resolve_plan
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator
from simmerge_ray.search.labels import Infeasible, LabelStore, Measured, Stopped
from simmerge_ray.search.runner import EvaluatorStartError, TrialRunner, copy_labels
from simmerge_ray.search.setup import PreparedSearch, Trial, grid_trials, prepare_search
from simmerge_ray.search.summary import ranked_results
from tests import tiny

ARMS = ("linear", "ties(density=0.2)")
LOCAL = SearchConfig(arms=ARMS, evaluator="transformers")


@pytest.fixture
def tasks(catalogue_path):
    return load_tasks(catalogue_path.parent / "tasks")


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.usefixtures("ray_cluster")
def test_labels_of_vllm_trials_equal_transformers_and_nothing_is_evaluated_twice(catalogue, tasks, tmp_path):
    config = SearchConfig(arms=ARMS, concurrency=1)
    seen: list[tuple[int, int]] = []
    result = run_search(
        catalogue, tasks, config, tmp_path / "labels", report=lambda one: seen.append((one.done, one.total))
    )
    num_singles, num_merges = 4, 2 * len(ARMS)
    assert result.num_trials_run == num_singles + num_merges == len(seen) == seen[-1][0]
    assert result.infeasible == {}
    labels = result.store.read()
    assert len(labels) == 2 * num_singles + 2 * num_merges
    reference = TransformersEvaluator(catalogue.base)
    for label in labels:
        reference.load(resolve_plan(label.plan, catalogue))
        assert isinstance(label.outcome, Measured) and label.settings.evaluator == "vllm"
        assert label.outcome.items.tolist() == tasks[label.task].evaluate(reference).tolist(), label.plan.label
    assert run_search(catalogue, tasks, config, tmp_path / "labels").num_trials_run == 0


def grid(catalogue, tasks, uri, **changes) -> tuple[PreparedSearch, list[Trial]]:
    study = prepare_search(catalogue, tasks, LOCAL.model_copy(update=changes), str(uri))
    return study, grid_trials(study)


def run_here(catalogue, tasks, uri) -> list:
    """Run what is missing, in this process; returns the trials that were run."""
    study, trials = grid(catalogue, tasks, str(uri))
    runner = TrialRunner(study, start_evaluator)
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


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_an_evaluator_that_does_not_start_ends_the_search_with_its_reason(catalogue, tasks, tmp_path, catalogue_path):
    root = tmp_path / "zoo"
    shutil.copytree(catalogue_path.parent, root)
    broken = load_catalogue(root / "catalogue.yaml")
    model = tiny.make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    tiny.save(model, root / "base")
    with pytest.raises(EvaluatorStartError, match="transformers evaluator did not start.*'base'.*NaN or infinity"):
        run_search(broken, tasks, LOCAL.model_copy(update={"concurrency": 1}), tmp_path / "labels")
    assert LabelStore(tmp_path / "labels").read() == []


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
    assert "holds NaN" in (TrialRunner(study, start_evaluator).run(trial).infeasible or "")
    (label, *_) = LabelStore(tmp_path / "labels").read()
    assert isinstance(label.outcome, Infeasible) and "model.norm.weight holds NaN" in label.outcome.reason


# Between these checkpoints SLERP is the linear average below its first threshold, and has an arc below the second.
CLOSE, APART = "slerp(threshold=0.5)", "slerp(threshold=1)"


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


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_search_copies_the_labels_of_the_same_merge_when_they_are_there(catalogue, tasks, tmp_path):
    config = LOCAL.model_copy(update={"arms": (CLOSE, "linear"), "concurrency": 1})
    labels = run_search(catalogue, tasks, config, tmp_path / "labels").store.read()
    assert len(labels) == 16 and sum(label.same_as is not None for label in labels) == 4
    assert run_search(catalogue, tasks, config, tmp_path / "labels").num_trials_run == 0


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


def prometheus_samples(name: str) -> dict[str, float]:
    """Values of a metric that the cluster exports, summed by the `outcome` label; waits until there are some."""
    import ray

    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with urllib.request.urlopen(url) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith(f"{name}{{")]
        if lines:
            found: dict[str, float] = {}
            for line in lines:
                label = next(part for part in re.split("[{},]", line) if part.startswith("outcome="))
                found[label] = found.get(label, 0.0) + float(line.rsplit(" ", 1)[1])
            return found
        time.sleep(0.5)
    raise AssertionError(f"{url} has no {name}")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_search_with_a_budget_stops_bad_trials_early_and_goes_on_from_its_labels(catalogue, tasks, tmp_path):
    config = LOCAL.model_copy(update={"arms": ("linear", "ties"), "budget": 10, "concurrency": 1, "shards": 3})
    limited = config.model_copy(update={"max_trials": 9})
    seen: list[tuple[int, int, int]] = []
    first = run_search(
        catalogue, tasks, limited, tmp_path, report=lambda s: seen.append((s.done, s.total, s.num_items))
    )
    num_singles = 4
    assert first.num_trials_run == 9 == seen[-1][0] and seen[-1][2] > 0 and first.status.best is not None
    assert first.num_left == 0 and first.status.items_per_second > 0
    merges = {label.plan.id for label in LabelStore(tmp_path).read() if label.plan.steps}
    assert len(merges) == 9 - num_singles
    second = run_search(catalogue, tasks, config, tmp_path)
    assert second.num_trials_run == 10 - len(merges)
    by_kind: dict[type, int] = {}
    for label in LabelStore(tmp_path).read():
        if label.plan.steps and label.task == "add":
            by_kind[type(label.outcome)] = by_kind.get(type(label.outcome), 0) + 1
            assert len(label.outcome.items) <= len(tasks["add"].items)
            assert (len(label.outcome.items) < len(tasks["add"].items)) == isinstance(label.outcome, Stopped)
    assert by_kind[Measured] + by_kind[Stopped] == 10
    assert run_search(catalogue, tasks, config, tmp_path).num_trials_run == 0
    samples = prometheus_samples("ray_simmerge_search_trials_total")
    assert samples['outcome="measured"'] >= num_singles + by_kind[Measured]
    merged, singles = ranked_results(second.search)
    assert len(merged) == by_kind[Measured] and len(singles) == num_singles and merged[0].best


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_search_that_is_out_of_time_ends_cleanly_and_is_continued(catalogue, tasks, tmp_path):
    config = LOCAL.model_copy(update={"concurrency": 1})
    cut_off = run_search(catalogue, tasks, config.model_copy(update={"max_hours": 1e-6}), tmp_path)
    assert cut_off.num_left > 0 and cut_off.num_trials_run + cut_off.num_left == 8
    assert run_search(catalogue, tasks, config, tmp_path).num_trials_run == cut_off.num_left
    assert len(LabelStore(tmp_path).read()) == 16
