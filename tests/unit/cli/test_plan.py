"""`simmerge plan CATALOGUE` on the tiny catalogue: what it shows and writes, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from simmerge_ray.base.config import RankingConfig, RankingFiles
from simmerge_ray.base.errors import ConfigError, PlanError, SelectorError
from simmerge_ray.base.storage import read_json
from simmerge_ray.cli.app import app
from simmerge_ray.cli.plan import best_single, best_singles
from simmerge_ray.plans.plan import WEIGHTINGS, fold_plan, fold_text, read_plan
from simmerge_ray.search.objectives import parse_objective
from simmerge_ray.selector.models.model import read_selector
from simmerge_ray.selector.models.policy import INTERVAL_LEVELS, Intervals
from simmerge_ray.selector.planning.files import SHORTLIST, default_selector, ranked_json
from simmerge_ray.selector.planning.recommender import Recommender
from simmerge_ray.selector.planning.request import PlanRequest, read_sources
from simmerge_ray.selector.planning.search import AGGREGATES
from simmerge_ray.selector.planning.tasks import TaskPool
from simmerge_ray.service.planning import PlanRanker
from simmerge_ray.service.registry import Published
from simmerge_ray.service.schemas import PlansRequest
from simmerge_ray.signals.propagation.table import PROPAGATORS
from simmerge_ray.signals.table import read_signal_table
from tests import tiny
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
        (("--ways", "x"), ConfigError, "ways is a number"),
        (("--propagator", "exact"), ConfigError, "give --probes"),
        (("--arm", "slerp"), SelectorError, "simmerge labels make"),
        (("--task", "sing"), PlanError, "simmerge signals --probes"),
        (("--must-contain", "m9"), PlanError, "unknown checkpoint"),
        (("--left", "m0"), ConfigError, "give both"),
        (("--signatures", "/nowhere"), ConfigError, "lacks signatures"),
    ],
)
def test_bad_input_is_refused(run, catalogue_path, options, error, message):
    result = invoke(run, catalogue_path, *options)
    assert isinstance(result.exception, error) and message in str(result.exception)


def test_an_unknown_propagator_is_refused_with_all_names(run, catalogue_path):
    result = invoke(run, catalogue_path, "--propagator", "virtul")
    assert result.exit_code == 2 and "'virtul' is not one of" in result.output
    assert set(get_args(RankingConfig.model_fields["propagator"].annotation)) == set(PROPAGATORS)
    assert get_args(RankingConfig.model_fields["aggregate"].annotation) == AGGREGATES
    assert get_args(RankingConfig.model_fields["weighting"].annotation) == WEIGHTINGS


def test_a_pair_refuses_the_options_that_it_would_ignore(run, catalogue_path):
    for_pair = ("--left", "m0", "--right", "m1")
    ignored = ("--ways", "2", "--propagator", "second_order", "--arm", "linear", "--top", "3", "--signatures", "s")
    result = invoke(run, catalogue_path, *for_pair, *ignored)
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith("--signatures, --ways, --arm, --propagator, --top: not for one pair")
    assert invoke(run, catalogue_path, *for_pair, "--task", "add", "--ways", "2-3").exit_code == 0


def test_a_pair_with_a_checkpoint_that_has_changed_since_its_signals_is_refused(run, catalogue_path, tmp_path):
    shutil.copytree(catalogue_path.parent, tmp_path / "zoo")
    tiny.save(tiny.make_model(seed=5), tmp_path / "zoo" / "m1")
    changed = tmp_path / "zoo" / "catalogue.yaml"
    result = invoke(run, changed, "--left", "m0", "--right", "m1")
    assert isinstance(result.exception, PlanError)
    assert str(result.exception) == "checkpoint 'm1' has changed since its signals; run `simmerge signals` again"
    assert invoke(run, changed, "--left", "m0", "--right", "m2").exit_code == 0  # the others are not looked at


def test_the_service_ranks_plans_as_the_command_does(run, catalogue_path, catalogue, tmp_path):
    table = read_signal_table(run / "pairs.parquet")
    selector, shortlist = read_selector(run / "selector"), read_selector(run / "selector" / SHORTLIST)
    published = Published(selector.version, selector, shortlist, None)
    for propagator, signatures in (("virtual", str(run / "signatures")), ("second_order", None)):
        for number, (options, asked) in enumerate(
            (
                (("--ways", "2-3"), {"ways": "2-3"}),
                (("--ways", "3", "--task", "copy"), {"task": "copy", "ways": 3}),
                (
                    ("--ways", "2", "--exclude", "m2", "--task", "add"),
                    {"checkpoints": ["m0", "m1"], "task": "add", "ways": "2"},
                ),
            )
        ):
            out = tmp_path / f"{propagator}{number}"
            told = ("--propagator", propagator, "--top", "8", "--out", str(out))
            result = invoke(run, catalogue_path, *options, *told)
            assert result.exit_code == 0, result.output
            printed = read_json(out / "ranking.json")
            ranking = PlanRanker(published, table, catalogue, signatures).rank(PlansRequest(**asked), top=8)
            assert printed["plans"] == [ranked_json(one) for one in ranking.plans]
            assert printed["best_fixed"] == ranked_json(ranking.best_fixed)
            assert printed["num_scored"] == ranking.num_scored


def test_a_plan_in_one_line():
    from simmerge_ray.plans.operators.specs import parse_arms

    arms = parse_arms(["linear", "ties"])
    assert fold_text(fold_plan("abc", arms)) == "a + b (linear) + c (ties)"
    assert fold_text(fold_plan("abc", arms[:1])) == "linear: a + b + c"


def test_the_best_single_checkpoint_is_a_measured_one_where_there_is_any():
    table = synthetic_table(3)
    assert "c01, measured 0.700" in best_single("s", table, {"s": {"c00": 0.2, "c01": 0.7, "gone": 0.9}})
    assert "no checkpoint was measured alone" in best_single("s", table, {})


def test_plans_of_several_tasks_have_the_best_single_checkpoint_on_the_same_tasks_beside_them():
    table, pool = synthetic_table(3, ("s", "t")), TaskPool(parse_objective("mean", ("s", "t")), ("s", "t"))
    parents = {"s": {"c00": 0.9, "c01": 0.7, "c02": 1.0}, "t": {"c00": 0.1, "c01": 0.6}}
    said = best_singles(pool, ("s", "t"), table, parents)
    assert "of 2 measured on the first plan's tasks, s, t: c01, 0.650" in said
    assert "not known here" in best_singles(pool, ("s", "t"), table, {"s": {"c00": 1.0}})


def pair(run, catalogue_path, selector, out):
    options = ("--left", "m0", "--right", "m1", "--out", str(out))
    fixed = ["plan", str(catalogue_path), "--selector", str(selector), "--signals", str(run / "pairs.parquet")]
    return CliRunner().invoke(app, [*fixed, *options], env={"COLUMNS": "200"})


def test_for_a_pair_the_plan_of_the_safe_choice_is_written_with_its_reason(run, catalogue_path, tmp_path):
    result = pair(run, catalogue_path, run / "selector", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    answer = Recommender.load(run / "selector", run / "pairs.parquet").recommend("m0", "m1")
    resolved, predicted = read_plan(tmp_path / "plan.json")
    assert resolved.plan.steps[0].arm.label == answer.choice.arm and predicted == answer.predicted
    said, marked = [line for line in result.output.splitlines() if line.startswith("*")]
    assert said == f"* take {answer.choice.arm}: {answer.choice.reason}"
    assert answer.choice.arm in marked and all(one.arm in result.output for one in answer.ranked)


def test_a_pair_unlike_those_of_the_training_gets_the_best_fixed_arm(run, catalogue_path, tmp_path):
    selector = read_selector(run / "selector")
    eager = replace(selector.override, threshold=-1.0)
    replace(selector, override=eager, novelty=replace(selector.novelty, limit=0.0)).write(tmp_path / "selector")
    result = pair(run, catalogue_path, tmp_path / "selector", tmp_path / "plan.json")
    assert "not trained for such checkpoints" in result.output
    resolved, predicted = read_plan(tmp_path / "plan.json")
    assert resolved.plan.steps[0].arm.label == selector.best_fixed and not predicted
    assert "predicted utility" not in result.output and "interval" not in result.output  # it knows nothing of them


def test_missing_artifacts_say_which_command_makes_them(run, catalogue_path, tmp_path):
    for place, message in (("selector", "simmerge train"), ("signals", "simmerge signals")):
        given = {"selector": run / "selector", "signals": run / "pairs.parquet"} | {place: tmp_path / "absent"}
        options = [f"--{name}={path}" for name, path in given.items()]
        result = CliRunner().invoke(app, ["plan", str(catalogue_path), *options])
        assert message in str(result.exception) and "no s" in str(result.exception)


def test_the_label_error_of_the_selector_in_the_package_is_that_of_the_study_s_labels():
    labels = Path(__file__).parents[3] / "docs" / "study" / "labels.parquet"
    rows = pq.read_table(labels, columns=["se", "members", "operators"]).to_pylist()
    of_pairs = [row for row in rows if len(row["members"]) == 2 and ";" not in row["operators"]]
    errors = [row["se"] for row in of_pairs if row["se"] is not None]
    assert read_selector(default_selector()).label_error == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-9)


def test_without_a_selector_the_one_in_the_package_ranks_and_says_that_it_knows_no_such_checkpoints(
    run, catalogue_path, tmp_path
):
    fixed = ["plan", str(catalogue_path), "--signals", str(run / "pairs.parquet")]
    result = CliRunner().invoke(app, [*fixed, "--ways", "2", "--out", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    shipped = read_selector(default_selector())
    lines = result.output.splitlines()
    assert lines[0].startswith("the packaged selector speaks, trained on 1296 contexts")
    assert lines[1].startswith("warning: 3 of 3 pairs are unlike") and f"{shipped.best_fixed}, is the safe" in lines[1]
    assert "not known" in result.output and not re.search(r"\d\.\d{3}", result.output), "a number that says nothing"
    ranking = read_json(tmp_path / "ranking.json")
    assert all(one["unlike"] and one["utility"] is None and not one["by_task"] for one in ranking["plans"])
    made = [read_plan(path)[0].plan for path in tmp_path.glob("plan-*.json")]
    assert {step.arm.label for plan in made for step in plan.steps} <= set(shipped.arms)
    one = CliRunner().invoke(app, [*fixed, "--left", "m0", "--right", "m1"], env={"COLUMNS": "200"})
    assert one.exit_code == 0 and f"* take {shipped.best_fixed}: not trained for such" in one.output


def test_a_ranking_says_when_leaving_the_best_fixed_arm_has_not_paid(run, catalogue_path, tmp_path):
    selector = read_selector(run / "selector")
    known = replace(selector.override, gain=0.0)
    for number, (override, said) in enumerate(
        (
            (replace(known, threshold=math.inf), "leaving it has not paid on checkpoints that were left out"),
            (replace(known, threshold=math.inf, gain=None), "too few checkpoints to leave some out"),
            (replace(known, threshold=0.02), None),
        )
    ):
        changed = tmp_path / str(number)
        replace(selector, override=override).write(changed)
        read_selector(run / "selector" / SHORTLIST).write(changed / SHORTLIST)
        result = CliRunner().invoke(
            app,
            ["plan", str(catalogue_path), "--selector", str(changed), "--signals", str(run / "pairs.parquet")],
            env={"COLUMNS": "400"},
        )
        for text in ("has not paid", "too few checkpoints to leave some out"):
            assert (text in result.output) == (said is not None and text in said), result.output


def request_of(run, catalogue, **options) -> PlanRequest:
    config = RankingConfig(propagator="second_order", **options)
    files = RankingFiles(signals=run / "pairs.parquet", selector=run / "selector")
    return read_sources(files, catalogue, config.propagator).request(config)


def test_pairs_like_the_training_are_not_called_unlike(run, catalogue):
    request = request_of(run, catalogue, tasks=("add", "copy"))
    for limit, unlike in ((1e9, []), (-1.0, [("m0", "m1"), ("m0", "m2"), ("m1", "m2")])):
        selector = request.sources.selector
        changed = replace(selector, novelty=replace(selector.novelty, limit=limit))
        assert replace(request, sources=replace(request.sources, selector=changed)).unlike_pairs == unlike


def test_plans_that_the_selector_does_not_know_come_last_and_without_numbers(run, catalogue):
    request = request_of(run, catalogue, ways="2")
    whole = request.rank(top=6)
    assert not any(one.unlike for one in whole.plans)
    best = whole.plans[0].plan

    def are_unlike(pairs: list[tuple[str, str]]) -> np.ndarray:
        return np.array([set(pair) == set(best.members) for pair in pairs])

    ranking = request.sources.scorer.rank(request.space, request.pool, 6, request.config, are_unlike)
    assert [one.unlike for one in ranking.plans] == [False] * 4 + [True] * 2
    assert {one.plan.members for one in ranking.plans if one.unlike} == {best.members}
    assert ranked_json(ranking.plans[-1])["interval"] is None and ranking.plans[-1].predicted == {}


def test_no_interval_is_narrower_than_the_error_of_the_labels(run, catalogue):
    request = request_of(run, catalogue, ways="2")
    error = request.sources.selector.label_error
    assert 0.04 < error < 0.08  # 20 items of a uniform utility: sqrt(1 / 12 / 20) = 0.065
    for one in request.rank(top=6).plans:
        low, high = replace(one, sd=0.0, utility=0.5).interval
        assert (high - low) / 2 == pytest.approx(1.96 * error)
        assert replace(one, sd=error, utility=0.5).interval[1] - 0.5 == pytest.approx(1.96 * error * 2**0.5)
    narrow = Intervals(INTERVAL_LEVELS, np.full((4, 2), 0.001))  # of ten contexts
    selector = replace(request.sources.selector, intervals=narrow)
    assert selector.half_widths(0.95) == pytest.approx(1.96 * error, rel=1e-3)
    assert selector.half_widths(0.5) == pytest.approx(0.6745 * error, rel=1e-3)


def test_the_ranking_reports_how_far_it_is(run, catalogue):
    request, seen = request_of(run, catalogue, ways="2-3"), []
    request.rank(3, lambda done, total: seen.append((done, total)))
    assert len(seen) > 2 and seen[0][0] == 0 and seen[-1][0] == seen[-1][1] and seen == sorted(seen)


def test_json_is_all_that_stands_on_stdout(run, catalogue_path):
    for options in ((), ("--left", "m0", "--right", "m1")):
        result = invoke(run, catalogue_path, "--json", *options)
        told = json.loads(result.stdout)
        assert told["selector"].startswith(f"the selector {run / 'selector'} speaks")
        assert told.get("plans") or told["arms"]


def test_a_pair_whose_checkpoint_has_changed_since_its_signals_is_refused(run, catalogue_path, tmp_path):
    table = read_signal_table(run / "pairs.parquet")
    changed = dict(table.provenance["checkpoints"]) | {"m0": "another"}
    replace(table, provenance={**table.provenance, "checkpoints": changed}).write(tmp_path / "pairs.parquet")
    fixed = ["plan", str(catalogue_path), "--selector", str(run / "selector"), "--left", "m0", "--right", "m1"]
    result = CliRunner().invoke(app, [*fixed, "--signals", str(tmp_path / "pairs.parquet")])
    assert isinstance(result.exception, PlanError) and "'m0' has changed since its signals" in str(result.exception)


def test_what_is_measured_has_the_best_fixed_arm_in_it(run, catalogue):
    ranking = request_of(run, catalogue, ways="2").rank(top=6)
    plans = [one.plan.id for one in ranking.plans]
    first_others = replace(
        ranking, plans=tuple(one for one in ranking.plans if one.plan.id != ranking.best_fixed.plan.id)
    )
    assert [one.plan.id for one in ranking.with_best_fixed().plans] == plans  # all plans: it is there
    measured = [one.plan.id for one in first_others.with_best_fixed().plans]
    others = [one.plan.id for one in first_others.plans]
    assert measured == [*others[:-1], ranking.best_fixed.plan.id]
    assert replace(first_others, plans=first_others.plans[:1]).with_best_fixed().plans == first_others.plans[:1]
