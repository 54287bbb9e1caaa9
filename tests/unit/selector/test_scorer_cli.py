"""`simmerge plan CATALOGUE` on the tiny catalogue: what it shows and writes, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from simmerge_ray.cli import app
from simmerge_ray.errors import ConfigError, PlanError, SelectorError
from simmerge_ray.plan_cli import best_single
from simmerge_ray.plans import fold_plan, fold_text, read_plan
from simmerge_ray.selector.model import read_selector
from simmerge_ray.service.recommender import Recommender
from tests.artifacts import write_artifacts
from tests.tables import synthetic_table


@pytest.fixture(scope="module")
def run(catalogue_path, tmp_path_factory):
    return write_artifacts(tmp_path_factory.mktemp("run"), catalogue_path)


def invoke(run, catalogue_path, *options: str):
    fixed = ["plan", str(catalogue_path), "--selector", str(run / "selector"), "--signals", str(run / "pairs.parquet")]
    return CliRunner().invoke(app, [*fixed, *options], env={"COLUMNS": "200"})


@pytest.mark.parametrize("propagator", ["second_order", "virtual"])
def test_it_shows_a_table_and_writes_plans_that_can_be_read(run, catalogue_path, tmp_path, propagator):
    result = invoke(
        run, catalogue_path, "--ways", "2-3", "--top", "4", "--propagator", propagator, "--out", str(tmp_path / "p")
    )
    assert result.exit_code == 0, result.output
    assert f"ranked by {propagator}" in result.output and "predicted" in result.output
    resolved, predicted = read_plan(tmp_path / "p" / "plan-1.json")
    assert set(resolved.plan.members) <= {"m0", "m1", "m2"} and predicted
    assert len(list((tmp_path / "p").glob("plan-*.json"))) == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--ways", "x"), ConfigError, "--ways"),
        (("--propagator", "virtul"), ConfigError, "did you mean 'virtual'"),
        (("--propagator", "exact"), ConfigError, "give --probes"),
        (("--arm", "slerp"), SelectorError, "simmerge search"),
        (("--task", "sing"), PlanError, "simmerge signals --probes"),
        (("--must-contain", "m9"), PlanError, "unknown checkpoint"),
        (("--left", "m0"), ConfigError, "give both"),
        (("--signatures", "/nowhere"), ConfigError, "lacks signatures"),
    ],
)
def test_bad_input_is_refused(run, catalogue_path, options, error, message):
    result = invoke(run, catalogue_path, *options)
    assert isinstance(result.exception, error) and message in str(result.exception)


def test_a_plan_in_one_line():
    from simmerge_ray.operators.specs import parse_arms

    arms = parse_arms(["linear", "ties"])
    assert fold_text(fold_plan("abc", arms)) == "a + b (linear) + c (ties)"
    assert fold_text(fold_plan("abc", arms[:1])) == "linear: a + b + c"


def test_the_best_single_checkpoint_is_a_measured_one_where_there_is_any():
    table = synthetic_table(3)
    assert "c01, measured 0.700" in best_single("s", table, {"s": {"c00": 0.2, "c01": 0.7, "gone": 0.9}})
    assert "no checkpoint was measured alone" in best_single("s", table, {})


def pair(run, catalogue_path, selector, out):
    options = ("--left", "m0", "--right", "m1", "--out", str(out))
    fixed = ["plan", str(catalogue_path), "--selector", str(selector), "--signals", str(run / "pairs.parquet")]
    return CliRunner().invoke(app, [*fixed, *options], env={"COLUMNS": "200"})


def test_for_a_pair_the_plan_of_the_safe_choice_is_written_with_its_reason(run, catalogue_path, tmp_path):
    result = pair(run, catalogue_path, run / "selector", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    answer = Recommender.load(run / "selector", run / "pairs.parquet").recommend("m0", "m1")
    resolved, predicted = read_plan(tmp_path / "plan.json")
    assert resolved.plan.steps[0].arm.label == answer.choice.arm and predicted == answer.chosen.predicted
    assert f"* take {answer.choice.arm}: {answer.choice.reason}" in result.output
    (marked,) = [line for line in result.output.splitlines() if line.startswith("│ *")]
    assert answer.choice.arm in marked and all(one.arm in result.output for one in answer.ranked)


def test_a_pair_unlike_those_of_the_training_gets_the_best_fixed_arm(run, catalogue_path, tmp_path):
    selector = read_selector(run / "selector")
    eager = replace(selector.override, threshold=-1.0)
    replace(selector, override=eager, novelty=replace(selector.novelty, limit=0.0)).write(tmp_path / "selector")
    result = pair(run, catalogue_path, tmp_path / "selector", tmp_path / "plan.json")
    assert "not trained for such checkpoints" in result.output
    assert read_plan(tmp_path / "plan.json")[0].plan.steps[0].arm.label == selector.best_fixed


def test_missing_artifacts_say_which_command_makes_them(run, catalogue_path, tmp_path):
    for place, message in (("selector", "simmerge train"), ("signals", "simmerge signals")):
        given = {"selector": run / "selector", "signals": run / "pairs.parquet"} | {place: tmp_path / "absent"}
        options = [f"--{name}={path}" for name, path in given.items()]
        result = CliRunner().invoke(app, ["plan", str(catalogue_path), *options])
        assert message in str(result.exception) and "no s" in str(result.exception)
