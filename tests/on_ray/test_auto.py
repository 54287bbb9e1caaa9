"""`simmerge auto`: what is refused before anything starts, the answers from labels that are there, and whole runs."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from simmerge_ray.base.config import EngineConfig, SearchConfig, TrainConfig
from simmerge_ray.base.errors import (
    ConfigError,
    LabelError,
    OperatorError,
    OutputError,
    PlanError,
    ProbeError,
    TaskError,
)
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import Manifest, check_outputs, read_json
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.cli.app import app
from simmerge_ray.cli.auto import measured_lines, measured_table, retention_lines, retention_table
from simmerge_ray.on_ray import finding
from simmerge_ray.on_ray.engines import start_evaluator
from simmerge_ray.pipelines.auto.answer import auto_outputs, auto_run, label_free_json, write_stage
from simmerge_ray.pipelines.auto.expected import expect
from simmerge_ray.pipelines.auto.find import find_here, find_stages
from simmerge_ray.pipelines.auto.measure import (
    first_measured,
    measure_stage,
    measured_json,
    prepare_measuring,
    simple_merges,
)
from simmerge_ray.pipelines.auto.request import AutoRun, LabelFree
from simmerge_ray.plans.plan import MergePlan, read_plan
from simmerge_ray.search.evaluation import load_tasks
from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator
from simmerge_ray.search.labels import Infeasible, LabelStore, Measured
from simmerge_ray.search.objectives import Objective
from simmerge_ray.selector.finding.aim import Aim
from simmerge_ray.selector.finding.choice import Finding
from simmerge_ray.selector.finding.probed import ProbedPlan
from simmerge_ray.selector.finding.sources import find_request
from simmerge_ray.selector.finding.space import kept_checkpoints, sum_of
from simmerge_ray.selector.finding.virtual import VirtualScores
from simmerge_ray.selector.predictor.train import train_predictor
from simmerge_ray.signals.candidates.signatures import Owner
from simmerge_ray.signals.queue import Unit, WorkQueue
from tests.unit.search.evaluation.test_harness import write_suite
from tests.unit.selector.predictor.made_up import rows_of_bases

ENGINE = SearchConfig(pairs="all", evaluator="transformers", concurrency=1)
FIND = FindConfig(members=("m0", "m1"), num_recipes=200, shortlist=4, tune="none", max_tokens=4)


@pytest.fixture(scope="module")
def request_(catalogue, catalogue_path):
    return find_request(catalogue, load_probe_sets(catalogue_path.parent / "probes"), FIND)


@pytest.fixture
def tasks(catalogue_path):
    return load_tasks(catalogue_path.parent / "tasks")


def run_in(out, request, tasks=None, **options) -> AutoRun:
    given = {"evaluate": 2 if tasks else 0} | options
    return AutoRun(request, ENGINE, out, str(out / "signatures"), tasks or {}, **given)


SCORED = VirtualScores(("m0", "m1"), np.zeros((3, 2)), {}, *(np.zeros((3, 2)) for _ in range(3)), np.zeros(3))


def probed(plan: MergePlan, score: float) -> ProbedPlan:
    return ProbedPlan(plan, np.array([score, score]), np.array([0.1, 0.2]), 24, score, score)


def planted(request, scores: dict[str, float]) -> LabelFree:
    """A choice without labels: two merges `a`, `b` and the checkpoints, with these scores."""
    merges = {"a": sum_of([("m0", 0.7), ("m1", 0.4)]), "b": sum_of([("m0", 0.2), ("m1", 0.9)])}
    plans = merges | {plan.label: plan for plan in kept_checkpoints(request.catalogue.ids, request.base)}
    ranked = sorted((probed(plan, scores[name]) for name, plan in plans.items()), key=lambda one: -one.score)
    aim = Aim((Owner("m0", "add"), Owner("m1", "copy")), "base", Objective("mean"))
    return LabelFree(ranked[0], Finding(aim, tuple(ranked), SCORED, None), ())


def invoke(catalogue_path, out, *options: str, catalogue=None):
    given = ["--probes", str(catalogue_path.parent / "probes"), "--out", str(out), "--evaluator", "transformers"]
    return CliRunner().invoke(app, ["auto", str(catalogue or catalogue_path), *given, *options])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--objective", "ad"), ConfigError, "did you mean 'add'"),
        (("--member", "m9"), PlanError, "unknown checkpoint 'm9'"),
        (("--ways", "x"), ConfigError, "--ways"),
        (("--ways", "5-6"), ConfigError, "ways 5-6: there are 3 checkpoints"),
        (("--forget", "2"), SystemExit, "2"),
        (("--arm", "tise"), OperatorError, "did you mean 'ties'"),
        (("--evaluate", "2"), ConfigError, "give both"),
        (("--max-model-len", "500"), ConfigError, "max_model_len is 500"),
    ],
)
def test_bad_options_are_refused_and_leave_nothing(catalogue_path, tmp_path, options, error, message):
    log = ("--log", str(tmp_path / "log" / "simmerge.log"))
    result = invoke(catalogue_path, tmp_path / "out", *options, *log)
    assert isinstance(result.exception, error) and message in str(result.exception)
    assert not (tmp_path / "out").exists() and not (tmp_path / "log").exists()


def test_labels_that_cannot_decide_are_refused(catalogue_path, tmp_path, request_, tasks):
    tasks_at = ("--tasks", str(catalogue_path.parent / "tasks"), "--evaluate", "2")
    result = invoke(catalogue_path, tmp_path / "out", *tasks_at, "--max-items", "3")
    assert isinstance(result.exception, TaskError) and "task 'add' has 3 items" in str(result.exception)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "add.jsonl").write_text(json.dumps({"prompt": "a=", "target": "b"}) + "\n")
    result = invoke(catalogue_path, tmp_path / "out", "--tasks", str(tmp_path / "tasks"), "--evaluate", "2")
    assert "no task 'copy'" in str(result.exception) and str(result.exception).endswith("known: add")


def test_tasks_of_lm_eval_measure_a_member_s_task_by_its_name(catalogue_path, request_, tmp_path):
    pytest.importorskip("lm_eval")
    suite = write_suite(tmp_path / "suite", TransformersEvaluator(request_.catalogue.base))
    names = ("add=pick", "copy=spell")
    engine = EngineConfig(evaluator="transformers", lm_eval=names, lm_eval_include=suite, max_items=4)
    run = auto_run(request_, engine, tmp_path / "out", None, None, 2)
    tasks = run.tasks
    assert set(prepare_measuring(run).tasks) >= {"add", "copy"}
    assert {name: (task.name, task.num_items) for name, task in tasks.items()} == {
        "add": ("add", 4),
        "copy": ("copy", 4),
    }
    (tmp_path / "tasks").mkdir()
    shutil.copy(catalogue_path.parent / "tasks" / "copy.jsonl", tmp_path / "tasks" / "copy.jsonl")
    mixed = engine.model_copy(update={"lm_eval": ("add=pick",)})  # files and lm_eval's together
    assert set(auto_run(request_, mixed, tmp_path / "out", None, tmp_path / "tasks", 2).tasks) == {"add", "copy"}
    for wrong, message in ((("pick",), "--lm-eval add=NAME"), (("add=three", "copy=spell"), "'three' is 3 tasks")):
        with pytest.raises(TaskError, match=message):
            auto_run(request_, engine.model_copy(update={"lm_eval": wrong}), tmp_path / "out", None, None, 2)


def test_a_catalogue_that_cannot_be_asked_is_one_message(catalogue_path, tmp_path):
    text = catalogue_path.read_text().replace("path: ", f"path: {catalogue_path.parent}/")
    without_task = tmp_path / "catalogue.yaml"
    without_task.write_text(text.replace("  task: copy\n", "").replace("task: add", "task: sub", 1))
    result = invoke(catalogue_path, tmp_path / "out", catalogue=without_task)
    assert isinstance(result.exception, ProbeError)
    assert "'m0': no probes of its task; write sub.jsonl" in str(result.exception)
    assert "'m1' has no task" in str(result.exception)
    content = yaml.safe_load(text)
    del content["base"]
    without_base = tmp_path / "no_base.yaml"
    without_base.write_text(yaml.safe_dump(content))
    result = invoke(catalogue_path, tmp_path / "out", catalogue=without_base)
    assert isinstance(result.exception, ConfigError) and "under `base`" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="merged .* is not a merge made by simmerge"):
        check_outputs(auto_outputs(tmp_path, None, write=True))
    check_outputs(auto_outputs(tmp_path, None, write=False))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="--out .* is a file"):
        check_outputs(auto_outputs(tmp_path / "file", None, write=False))


def test_a_checkpoint_that_keeps_as_much_as_any_merge_is_kept(request_, tmp_path):
    found = planted(request_, {"a": 0.8, "b": 0.7, "m0": 0.9, "m1": 0.5, "base": 0.4})
    assert "answer: keep m0: no merge keeps more" in retention_lines(found)
    written(request_, found, tmp_path)
    answer = read_json(tmp_path / "auto.json")
    assert answer["answer"] == "keep" and answer["winner"] == "m0" and answer["merged"] is None
    assert not (tmp_path / "merged").exists() and not (tmp_path / "plan.json").exists()


def written(request, found, out, **options) -> str:
    """What is printed while the answer of `found` is written."""
    run, printed = run_in(out, request, **options), io.StringIO()
    narrator = Narrator(Console(file=printed, width=250))
    write_stage(run, found.best.plan, label_free_json(run, found), Manifest("auto", {}, {}), 0.0, narrator)
    return printed.getvalue()


def test_a_merge_is_written_once_with_what_it_keeps_and_another_answer_replaces_it(request_, tmp_path):
    scores = {"a": 0.95, "b": 0.7, "m0": 0.9, "m1": 0.5, "base": 0.4}
    found = planted(request_, scores)
    written(request_, found, tmp_path)
    answer = read_json(tmp_path / "auto.json")
    assert answer["answer"] == "merge" and answer["merged"] == str(tmp_path / "merged")
    resolved, keeps = read_plan(tmp_path / "plan.json")
    assert resolved.plan.id == found.best.plan.id and answer["plan"] == found.best.plan.to_json()
    assert keeps == {"m0 on add": {"retention": 0.95}, "m1 on copy": {"retention": 0.95}}
    assert "| m0 on add | 0.950 |" in (tmp_path / "merged" / "README.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()}
    assert "already there" in written(request_, found, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()} == before
    other = planted(request_, scores | {"b": 0.99})
    assert "already there" not in written(request_, other, tmp_path)
    assert read_plan(tmp_path / "merged" / "simmerge_plan.json")[0].plan.id == other.best.plan.id
    kept = planted(request_, scores | {"m0": 1.0})
    assert "the merge of an earlier answer" in written(request_, kept, tmp_path)
    assert not (tmp_path / "plan.json").exists()


def test_the_answer_has_the_utilities_that_a_predictor_expects(request_, tmp_path):
    found = planted(request_, {"a": 0.95, "b": 0.7, "m0": 0.9, "m1": 0.5, "base": 0.4})
    written(request_, found, tmp_path / "without", write=False)
    assert read_json(tmp_path / "without" / "auto.json")["expected"] is None
    train_predictor(rows_of_bases(), TrainConfig(model="ridge", num_folds=4)).write(tmp_path / "predictor")
    run = auto_run(request_, EngineConfig(), tmp_path, None, None, 0, False, tmp_path / "predictor")
    told = label_free_json(run, found)["expected"]
    assert [one["label"] for one in told["candidates"]] == [one.plan.label for one in found.lines]
    assert all(set(one["utility"]) == {"add", "copy"} for one in told["candidates"])
    assert expect(run, found).lines(found.best.plan)


def test_without_write_only_the_plan_is_left(request_, tmp_path):
    found = planted(request_, {"a": 0.95, "b": 0.7, "m0": 0.9, "m1": 0.5, "base": 0.4})
    assert "simmerge merge" in written(request_, found, tmp_path, write=False)
    assert (tmp_path / "plan.json").exists() and not (tmp_path / "merged").exists()
    assert read_json(tmp_path / "auto.json")["merged"] is None


def test_the_table_has_the_answer_every_checkpoint_and_every_member(request_):
    found = planted(request_, {"a": 0.95, "b": 0.7, "m0": 0.9, "m1": 0.5, "base": 0.4})
    retention_table(found).print(Console(file=(printed := io.StringIO()), width=200))
    text = printed.getvalue()
    assert "m0 on add" in text and "m1 on copy" in text and "95 %" in text
    assert all(f"\n   {name} " in text for name in ("m0", "m1", "base")) and text.count("*") == 1
    assert retention_lines(found)[0] == "answer: merge task_arithmetic: 0.7 m0 + 0.4 m1"
    notes = [line for line in retention_lines(found) if line.startswith("note: run as a candidate")]
    assert len(notes) == 1 and "so much of their own answers: m0 90 %, m1 50 %. Answers are made in float32" in notes[0]
    nothing = replace(found, best=replace(found.best, retention=np.array([0.8, 0.0])))
    assert "warning: the answer keeps none of the answers of m1 on copy" in retention_lines(nothing)


def test_simple_merges_are_among_what_is_measured(request_):
    found = planted(request_, {"a": 0.95, "b": 0.7, "m0": 0.9, "m1": 0.5, "base": 0.4})
    assert [plan.label for plan in first_measured(found, ("m0", "m1"), 8)][-2:] == [
        "linear: 0.5 m0 + 0.5 m1", "scale_matched_linear: 1 m0 + 1 m1",
    ]  # fmt: skip
    assert len(first_measured(found, ("m0", "m1"), 1)) == 1 and len(first_measured(found, ("m0", "m1"), 2)) == 2
    simple = simple_merges(("m0", "m1", "m2"), found.ranking, 2)
    assert [plan.members for plan in simple] == [("m0", "m1", "m2")] * 2 + [("m0", "m1"), ("m0", "m2")]
    assert simple[2] == found.ranking[0] and simple[3].recipe.arm.label == "linear"


def measured(run: AutoRun, found: LabelFree, levels: dict[str, float], feasible: bool = True, noise: float = 0.01):
    """What is decided from labels with these utilities and a little noise; nothing is run."""
    generator = np.random.default_rng(0)
    search, labels = prepare_measuring(run), []
    merges = {plan.id: name for name, plan in zip("ab", found.ranking, strict=True)}
    for plan in [*(one.plan for one in found.finding.ranked)]:
        for name, task in run.tasks.items():
            level = levels[merges.get(plan.id, plan.label)]
            outcome = Measured(level + noise * generator.random(task.num_items))
            failed = plan.is_merge and not feasible
            labels.append(search.label(plan, name, Infeasible("a tensor holds NaN") if failed else outcome, 1.0))
    LabelStore(search.labels_uri).append(labels)
    return measure_stage(run, found, Narrator(Console(file=io.StringIO())))


SCORES = {"a": 0.8, "b": 0.7, "m0": 0.6, "m1": 0.5, "base": 0.4}


def test_labels_have_the_last_word_and_say_whether_the_score_was_right(request_, tasks, tmp_path):
    run, found = run_in(tmp_path, request_, tasks), planted(request_, SCORES)
    right = measured(run, found, SCORES)
    assert right.verdict.winner.plan == found.best.plan and right.agreement == pytest.approx(1.0)
    text = "\n".join([*right.verdict.lines(), *measured_lines(right)])
    assert "answer: merge task_arithmetic" in text and "rank correlation of score and labels: +1.00 over 5" in text
    content = measured_json(run, right)["measured"]
    assert content["utility"]["value"] == pytest.approx(0.805, abs=0.005) and content["num_ranked"] == 5
    assert {"choosing", "reporting", "score"} <= set(content["candidates"][0])
    measured_table(run, right).print(Console(file=(printed := io.StringIO()), width=200))
    assert "0.80" in printed.getvalue()


def test_a_score_that_misleads_is_said(request_, tasks, tmp_path):
    run, found = run_in(tmp_path, request_, tasks), planted(request_, SCORES)
    wrong = measured(run, found, {name: 1.0 - score for name, score in SCORES.items()})
    assert wrong.verdict.winner.plan.label == "base" and wrong.agreement == pytest.approx(-1.0)
    text = "\n".join([*wrong.verdict.lines(), *measured_lines(wrong)])
    assert "answer: do not merge: keep the base, base, as it is" in text and "the score misleads" in text


@pytest.mark.parametrize("better", ["a", "b"])
def test_of_merges_that_labels_do_not_tell_apart_the_one_with_the_highest_score_is_taken(
    request_, tasks, tmp_path, better
):
    run, found = run_in(tmp_path, request_, tasks), planted(request_, SCORES | {"a": 0.7, "b": 0.7, better: 0.8})
    equal = measured(run, found, SCORES | {"a": 0.75, "b": 0.75}, noise=0.0)
    best = max((one for one in found.finding.ranked if one.plan.is_merge), key=lambda one: one.score)
    assert equal.verdict.winner.plan == best.plan and equal.lines[0].plan == best.plan
    said = "1 other merge is as good on the half that chose; taken is the one with the highest score"
    assert said in equal.verdict.lines()


def test_merges_that_cannot_be_measured_leave_the_checkpoint(request_, tasks, tmp_path):
    run, found = run_in(tmp_path, request_, tasks), planted(request_, SCORES)
    failed = measured(run, found, SCORES, feasible=False)
    text = "\n".join([*failed.verdict.lines(), *measured_lines(failed)])
    assert "a tensor holds NaN" in text and "no merge could be measured" in text and "too few candidates (3)" in text


def test_nothing_measured_is_an_error(request_, tasks, tmp_path):
    run, found = run_in(tmp_path, request_, tasks), planted(request_, SCORES)
    search = prepare_measuring(run)
    plans = [one.plan for one in found.finding.ranked]
    LabelStore(search.labels_uri).append(
        [search.label(plan, task, Infeasible("no memory"), 1.0) for plan in plans for task in tasks]
    )
    with pytest.raises(LabelError, match="nothing could be measured: no memory"):
        measure_stage(run, found, Narrator(Console(file=io.StringIO())))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_whole_run_tunes_and_measures_and_the_next_one_computes_nothing(request_, tasks, tmp_path, monkeypatch):
    tuned = replace(request_, config=FIND.model_copy(update={"tune": "global"}))
    run = run_in(tmp_path, tuned, tasks)
    narrator = Narrator(Console(file=(printed := io.StringIO()), width=200))
    found = find_stages(run, narrator)
    content = label_free_json(run, found)
    assert content["num_scored"] >= 200 and set(content["keeps"]) == {"m0 on add", "m1 on copy"}
    kept = {one.plan.label: one.retention.tolist() for one in found.finding.checkpoints}
    assert kept["m0"][0] == 1.0 and kept["m1"][1] == 1.0  # each keeps all of its own answers
    assert len(found.tuned) == 1 and 0.0 <= found.tuned[0].held_out.score <= 1.0
    assert 0 < found.tuned[0].held_out.num_probes < found.tuned[0].whole.num_probes / 2  # a quarter of them
    measurement = measure_stage(run, found, narrator)
    best = measurement.verdict.winner.plan
    write_stage(run, best, content | measured_json(run, measurement), Manifest("auto", {}, {}), 0.0, narrator)
    answer = read_json(tmp_path / "auto.json")
    assert (answer["answer"] == "merge") == (tmp_path / "merged").exists()
    labels = [label for label in LabelStore(tmp_path / "labels").read() if label.task in tasks]
    for one in answer["measured"]["candidates"]:  # the figures are those of the labels
        for name in tasks:
            (label,) = [x for x in labels if x.plan.to_json() == one["plan"] and x.task == name]
            items = label.outcome.items
            assert one["reporting"]["by_task"][name]["value"] == pytest.approx(items[1::2].mean())
            assert one["choosing"]["by_task"][name]["value"] == pytest.approx(items[0::2].mean())
    if best.is_merge:
        assert read_plan(tmp_path / "plan.json")[0].plan.id == best.id
        read_headers(CheckpointRef("merged", tmp_path / "merged"))

    def refused(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr("simmerge_ray.on_ray.merge_search._run_trials", refused)
    monkeypatch.setattr("simmerge_ray.on_ray.signal_actors.ActorPool", refused)
    again = find_stages(run, narrator)
    assert label_free_json(run, again) == content
    measure_stage(run, again, narrator)
    assert "0 measured now" in printed.getvalue()

    # In one process, as the demo does for many pairs: the same choice.
    here = label_free_json(run, find_here(run_in(tmp_path / "here", tuned), start_evaluator))
    assert [row["label"] for row in here["candidates"]] == [row["label"] for row in content["candidates"]]
    assert [row["score"] for row in here["tuned"]] == pytest.approx(
        [row["score"] for row in content["tuned"]], abs=1e-3
    )
    assert here["keeps"] == pytest.approx(content["keeps"]) and here["best"]["score"] == pytest.approx(
        content["best"]["score"], abs=1e-3
    )


def test_actors_of_units_stay_for_all_rounds_and_end_before_what_follows(catalogue, monkeypatch):
    said: list[str] = []

    @contextmanager
    def session():
        said.append("cluster")
        yield
        said.append("no cluster")

    @contextmanager
    def actors(*_):
        said.append("actors")
        yield lambda queue: iter([(index, unit.kind) for index, unit in enumerate(queue.units)])
        said.append("no actors")

    monkeypatch.setattr(finding, "ray_session", session)
    monkeypatch.setattr(finding, "ray_executor", actors)
    with finding.ClusterOnDemand() as cluster:
        run = cluster.executor(catalogue, 2, 0.0)
        assert not said  # nothing was missing yet
        for kind in ("answers", "kept"):
            assert list(run(WorkQueue([Unit(kind, "m0", ())]))) == [(0, kind)]
        assert said == ["cluster", "actors"]
        cluster.start()  # trials, or tuning
        assert said == ["cluster", "actors", "no actors"]
        list(run(WorkQueue([Unit("kept", "m0", ())])))
    assert said == ["cluster", "actors", "no actors", "actors", "no actors", "no cluster"]
