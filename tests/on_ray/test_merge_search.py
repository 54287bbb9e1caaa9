"""The search on Ray Tune with real engines: labels, resume, infeasible merges, and engines that cannot be trusted."""

from __future__ import annotations

import io
import shutil

import pytest
import torch
from rich.console import Console

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import EngineError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.checkpoints.catalogue import load_catalogue
from simmerge_ray.on_ray.merge_search import run_search
from simmerge_ray.pipelines.dataset import search_bar
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, resolve_plan
from simmerge_ray.plans.recipe import recipe_of
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator
from simmerge_ray.search.labels import LabelStore, Measured, Stopped
from simmerge_ray.search.status import SearchStatus
from simmerge_ray.search.summary import ranked_results
from tests import tiny
from tests.on_ray.ray_metrics import exported

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
    with pytest.raises(EngineError, match="transformers evaluator did not start.*'base'.*NaN or infinity"):
        run_search(broken, tasks, LOCAL.model_copy(update={"concurrency": 1}), tmp_path / "labels")
    assert LabelStore(tmp_path / "labels").read() == []


THREE = {"m0": 0.5, "m1": 1.0, "m2": 0.4}
CLOSE = "slerp(threshold=0.5)"  # between these checkpoints the linear average


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_search_copies_the_labels_of_the_same_merge_when_they_are_there(catalogue, tasks, tmp_path):
    config = LOCAL.model_copy(update={"arms": (CLOSE, "linear"), "concurrency": 1})
    labels = run_search(catalogue, tasks, config, tmp_path / "labels").store.read()
    assert len(labels) == 16 and sum(label.same_as is not None for label in labels) == 4
    assert run_search(catalogue, tasks, config, tmp_path / "labels").num_trials_run == 0


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_search_with_a_budget_stops_bad_trials_early_and_goes_on_from_its_labels(catalogue, tasks, tmp_path):
    config = LOCAL.model_copy(update={"arms": ("linear", "ties"), "budget": 10, "concurrency": 1, "shards": 3})
    limited = config.model_copy(update={"max_trials": 9})
    seen: list[tuple[int, int, int]] = []
    start = [MergePlan(recipe=recipe_of(make_arm("linear"), one)) for one in ({"m0": 0.9, "m1": 0.3}, THREE)]
    first = run_search(
        catalogue, tasks, limited, tmp_path, report=lambda s: seen.append((s.done, s.total, s.num_items)), start=start
    )
    num_singles = 4
    assert first.num_trials_run == 9 == seen[-1][0] and seen[-1][2] > 0 and first.status.best is not None
    assert first.num_left == 0 and first.status.items_per_second > 0
    merges = {label.plan.id for label in LabelStore(tmp_path).read() if label.plan.is_merge}
    assert len(merges) == 9 - num_singles
    outcomes = {label.plan: label.outcome for label in first.store.read()}
    assert all(isinstance(outcomes[plan], Measured) for plan in start)  # never stopped, in the space or not
    second = run_search(catalogue, tasks, config, tmp_path, start=start)
    assert second.num_trials_run == 10 - len(merges)
    by_kind: dict[type, int] = {}
    for label in LabelStore(tmp_path).read():
        if label.plan.is_merge and label.task == "add":
            by_kind[type(label.outcome)] = by_kind.get(type(label.outcome), 0) + 1
            assert len(label.outcome.items) <= len(tasks["add"].items)
            assert (len(label.outcome.items) < len(tasks["add"].items)) == isinstance(label.outcome, Stopped)
    assert by_kind[Measured] + by_kind[Stopped] == 10
    assert run_search(catalogue, tasks, config, tmp_path, start=start).num_trials_run == 0
    number = num_singles + by_kind[Measured]
    assert exported("ray_simmerge_search_trials_total", 'outcome="measured"', least=number)
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


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_trials_that_all_fail_alike_are_said_at_once_and_end_the_search(catalogue_path, tasks, tmp_path):
    shutil.copytree(catalogue_path.parent, tmp_path / "zoo")
    broken = load_catalogue(tmp_path / "zoo" / "catalogue.yaml")
    model = tiny.make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    tiny.save(model, tmp_path / "zoo" / "m1")
    plans = [MergePlan(recipe=recipe_of(make_arm("linear"), {"m0": 0.1 * i, "m1": 1.0})) for i in range(1, 9)]
    said: list[str] = []
    with search_bar(Narrator(Console(file=(out := io.StringIO()), width=200))) as report:

        def told(status: SearchStatus) -> None:
            report(status)
            said.append(out.getvalue())

        with pytest.raises(EngineError, match="the first 5 merges all failed alike.*NaN or infinity.*--retry-"):
            run_search(broken, tasks, LOCAL.model_copy(update={"concurrency": 1}), tmp_path / "labels", plans, told)
    assert "failed: linear" in said[0] and "NaN or infinity" in said[0]  # with the first trial that ends
    assert out.getvalue().count("failed: linear") == 1  # each reason once
    assert len({label.plan.id for label in LabelStore(tmp_path / "labels").read()}) == 5
