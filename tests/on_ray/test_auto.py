"""`simmerge auto`: what is refused before anything starts, both answers from labels that are there, and a whole run."""

from __future__ import annotations

import io
import json
import time

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from simmerge_ray.base.config import RankingConfig, RankingFiles, SearchConfig
from simmerge_ray.base.errors import ConfigError, LabelError, OutputError, PlanError, SelectorError, TaskError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import Manifest, read_json
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.cli.app import app
from simmerge_ray.cli.auto import answer_stages, dry_run_lines, extrapolation_lines
from simmerge_ray.pipelines.auto import AutoRun, check_auto, on_same_tasks, plans_to_measure
from simmerge_ray.plans.plan import read_plan
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.search.labels import Infeasible, LabelStore, Measured
from simmerge_ray.search.objectives import Objective
from simmerge_ray.selector.planning.request import on_fixed_tasks, read_sources
from tests.artifacts import write_artifacts

CONFIG = SearchConfig(pairs="all", evaluator="transformers", concurrency=1)
MEAN = Objective("mean")


@pytest.fixture(scope="module")
def run(catalogue_path, tmp_path_factory):
    return write_artifacts(tmp_path_factory.mktemp("auto"), catalogue_path)


@pytest.fixture(scope="module")
def ranked(run, catalogue):
    """(request, ranking) of the first two merges of two checkpoints on both tasks."""
    config = RankingConfig(tasks=("add", "copy"), ways="2", propagator="second_order")
    files = RankingFiles(signals=run / "pairs.parquet", selector=run / "selector")
    request = read_sources(files, catalogue, config.propagator).request(config)
    return request, request.rank(top=2)


@pytest.fixture
def tasks(catalogue_path):
    return load_tasks(catalogue_path.parent / "tasks")


def invoke(run, catalogue_path, out, *options: str, **changes):
    given = {"selector": run / "selector", "signals": run / "pairs.parquet", "tasks": catalogue_path.parent / "tasks"}
    fixed = [f"--{name}={path}" for name, path in (given | {"out": out} | changes).items()]
    return CliRunner().invoke(app, ["auto", str(catalogue_path), *fixed, *options])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--task", "sing"), PlanError, "simmerge signals --probes"),
        (("--objective", "ad"), ConfigError, "did you mean 'add'"),
        (("--must-contain", "m9"), PlanError, "unknown checkpoint 'm9'"),
        (("--ways", "x"), ConfigError, "--ways"),
        (("--arm", "slerp"), SelectorError, "simmerge labels make"),
        (("--evaluator", "vlm"), SystemExit, "2"),
        (("--max-items", "3"), TaskError, "task 'add' has 3 items"),
        (("--max-model-len", "500"), ConfigError, "max_model_len is 500"),
    ],
)
def test_bad_options_are_refused_and_leave_nothing(run, catalogue_path, tmp_path, options, error, message):
    log = ("--log", str(tmp_path / "log" / "simmerge.log"))
    result = invoke(run, catalogue_path, tmp_path / "out", "--evaluator", "transformers", *options, *log)
    assert isinstance(result.exception, error) and message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_missing_artifacts_say_what_makes_them(run, catalogue_path, tmp_path):
    for name, message in (("selector", "`simmerge train` makes one"), ("signals", "`simmerge signals` makes one")):
        result = invoke(run, catalogue_path, tmp_path / "out", **{name: tmp_path / "absent"})
        assert message in str(result.exception)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "add.jsonl").write_text(json.dumps({"prompt": "a=", "target": "b"}) + "\n")
    result = invoke(run, catalogue_path, tmp_path / "out", tasks=tmp_path / "tasks")
    assert "has no copy.jsonl, which says what is measured on 'copy'; known: add" in str(result.exception)


def test_a_directory_that_is_not_ours_is_refused(catalogue, tasks, tmp_path):
    (tmp_path / "merged").mkdir()
    with pytest.raises(OutputError, match="is not a merge made by simmerge"):
        check_auto(AutoRun(catalogue, tasks, MEAN, CONFIG, tmp_path))
    check_auto(AutoRun(catalogue, tasks, MEAN, CONFIG, tmp_path, write=False))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="--out .* is a file"):
        check_auto(AutoRun(catalogue, tasks, MEAN, CONFIG, tmp_path / "file"))


def test_everything_is_counted_on_the_tasks_named_or_on_all_own_tasks(catalogue):
    def counted(**options):
        return on_fixed_tasks(RankingConfig(**options), catalogue).tasks

    assert counted() == counted(objective="worst") == ("add", "copy")
    assert counted(tasks=("copy",)) == ("copy",)
    assert counted(objective="add=2,copy=1") == ()
    with pytest.raises(ConfigError, match="--task"):
        on_fixed_tasks(RankingConfig(), on_same_tasks(catalogue))


def answer(ranked, catalogue, tasks, out, write=True) -> str:
    """What is printed from the measurements on."""
    request, ranking = ranked
    printed = io.StringIO()
    run = AutoRun(catalogue, tasks, request.pool.objective, CONFIG, out, write)
    answer_stages(run, ranking, Narrator(Console(file=printed, width=250)), Manifest("auto", {}, {}), time.monotonic())
    return printed.getvalue()


def write_labels(ranked, catalogue, tasks, out, of_merges: float, of_singles: float, feasible: bool = True) -> None:
    """Labels of everything that is to be measured, with these utilities and a little noise; no merge was made."""
    generator = np.random.default_rng(0)
    study = check_auto(AutoRun(catalogue, tasks, MEAN, CONFIG, out))
    labels = []
    for plan in plans_to_measure(ranked[1], catalogue):
        for name, task in tasks.items():
            level = of_merges if plan.steps else of_singles
            items = level + 0.01 * generator.random(task.num_items)
            outcome = Measured(items) if feasible or not plan.steps else Infeasible("a tensor holds NaN")
            labels.append(study.label(plan, name, outcome, 1.0))
    LabelStore(study.labels_uri).append(labels)


def test_a_merge_that_is_better_is_written_with_its_plan(ranked, catalogue, tasks, tmp_path):
    write_labels(ranked, catalogue, tasks, tmp_path, of_merges=0.8, of_singles=0.5)
    printed = answer(ranked, catalogue, tasks, tmp_path)
    assert "answer: merge " in printed and "more than two paired standard errors" in printed
    content = read_json(tmp_path / "auto.json")
    assert content["answer"] == "merge" and content["merge_minus_single"]["within_two_standard_errors"] is False
    assert content["utility"]["value"] == pytest.approx(0.805, abs=0.005)
    resolved, predicted = read_plan(tmp_path / "plan.json")
    assert resolved.plan.to_json() == content["plan"] and set(predicted) == {"add", "copy"}
    read_headers(CheckpointRef("merged", tmp_path / "merged"))

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()}
    assert "already there" in answer(ranked, catalogue, tasks, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()} == written


def test_a_checkpoint_that_no_merge_beats_is_kept_and_nothing_is_merged(ranked, catalogue, tasks, tmp_path):
    write_labels(ranked, catalogue, tasks, tmp_path, of_merges=0.5, of_singles=0.8)
    printed = answer(ranked, catalogue, tasks, tmp_path)
    assert "answer: keep " in printed and "no measured merge beats it" in printed
    content = read_json(tmp_path / "auto.json")
    assert content["answer"] == "keep" and content["merged"] is None and "source" in content["plan"]
    assert content["merge_minus_single"]["reporting"]["value"] < -0.25
    assert not (tmp_path / "merged").exists() and not (tmp_path / "plan.json").exists()
    # The merges, their members, the base; each with both halves.
    assert len(content["candidates"]) == len(plans_to_measure(ranked[1], catalogue))
    assert {"choosing", "reporting", "predicted"} <= set(content["candidates"][0])


def test_merges_that_cannot_be_measured_leave_the_checkpoint(ranked, catalogue, tasks, tmp_path):
    write_labels(ranked, catalogue, tasks, tmp_path, of_merges=0.9, of_singles=0.5, feasible=False)
    printed = answer(ranked, catalogue, tasks, tmp_path)
    assert "not measured: " in printed and "a tensor holds NaN" in printed and "no merge could be measured" in printed


def test_without_write_only_the_plan_is_left(ranked, catalogue, tasks, tmp_path):
    write_labels(ranked, catalogue, tasks, tmp_path, of_merges=0.8, of_singles=0.5)
    assert "simmerge merge" in answer(ranked, catalogue, tasks, tmp_path, write=False)
    assert (tmp_path / "plan.json").exists() and not (tmp_path / "merged").exists()


def test_a_dry_run_names_what_would_be_measured(ranked, catalogue, tasks, tmp_path):
    study = check_auto(AutoRun(catalogue, tasks, MEAN, CONFIG, tmp_path / "out"))
    text = "\n".join(dry_run_lines(study, ranked[1], catalogue.own_task, tmp_path / "out"))
    num = len(plans_to_measure(ranked[1], catalogue))
    assert f"trials   {num} to run" in text and "base" in text and "add (24 items)" in text
    assert not (tmp_path / "out").exists()


def test_merges_that_own_no_task_that_counts_are_said_to_be_extrapolated(ranked, catalogue):
    (line,) = extrapolation_lines(ranked[1], dict.fromkeys(catalogue.ids, "sing"), ["add", "copy"])
    assert line.startswith("2 of the 2 merges") and "add or copy" in line
    assert extrapolation_lines(ranked[1], catalogue.own_task, ["add", "copy"]) == []
    assert extrapolation_lines(ranked[1], dict.fromkeys(catalogue.ids), ["add", "copy"]) == []


def test_nothing_measured_is_an_error(ranked, catalogue, tasks, tmp_path):
    study = check_auto(AutoRun(catalogue, tasks, MEAN, CONFIG, tmp_path))
    plans = plans_to_measure(ranked[1], catalogue)
    LabelStore(study.labels_uri).append([study.label(p, t, Infeasible("no memory"), 1.0) for p in plans for t in tasks])
    with pytest.raises(LabelError, match="nothing could be measured: no memory"):
        answer(ranked, catalogue, tasks, tmp_path)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_whole_run_measures_each_plan_on_all_tasks_once(ranked, catalogue, tasks, tmp_path):
    printed = answer(ranked, catalogue, tasks, tmp_path)
    num = len(plans_to_measure(ranked[1], catalogue))
    assert f"{num} of {num} measured now" in printed and "answer: " in printed
    labels = LabelStore(tmp_path / "labels").read()
    assert len(labels) == 2 * num and all(isinstance(label.outcome, Measured) for label in labels)
    content = read_json(tmp_path / "auto.json")
    assert (content["answer"] == "merge") == (tmp_path / "merged").exists()
    for one in content["candidates"]:  # the figures are those of the labels
        for name in tasks:
            (label,) = [x for x in labels if x.plan.label == one["label"] and x.task == name]
            assert one["reporting"]["by_task"][name]["value"] == pytest.approx(label.outcome.items[1::2].mean())
    assert f"0 of {num} measured now" in answer(ranked, catalogue, tasks, tmp_path)
