"""`simmerge plan CATALOGUE` on the tiny catalogue: what it shows and writes, and what it refuses."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from simmerge_ray.cli import app
from simmerge_ray.config import TrainConfig
from simmerge_ray.errors import ConfigError, PlanError, SelectorError
from simmerge_ray.headroom import Context
from simmerge_ray.plan_cli import best_single, fold_text
from simmerge_ray.plans import fold_plan, read_plan
from simmerge_ray.propagation.second_order import SecondOrder
from simmerge_ray.selector.dataset import SelectionDataset, pair_features
from simmerge_ray.selector.plan_files import SHORTLIST
from simmerge_ray.selector.train import train_selector
from simmerge_ray.signals.compute import compute_signals
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore
from tests.tables import synthetic_table


@pytest.fixture(scope="module")
def run(catalogue_path, catalogue, tmp_path_factory):
    """Signals, signatures and both selectors, trained on made-up utilities."""
    import numpy as np

    from simmerge_ray.probes import load_probe_sets

    root = tmp_path_factory.mktemp("run")
    spec = SignatureSpec(batch_size=8, num_positions=20, num_attention_positions=6, num_coordinates=500)
    probes = load_probe_sets(catalogue_path.parent / "probes")
    table = compute_signals(catalogue, probes, spec, store=SignatureStore(root / "signatures"))
    table.write(root / "pairs.parquet")
    generator = np.random.default_rng(0)
    contexts, features = [], []
    for left, right in (("m0", "m1"), ("m0", "m2"), ("m1", "m2")):
        for task in table.tasks:
            for _ in range(2):
                items = {arm: generator.random(20) for arm in ("linear", "ties")}
                contexts.append(Context(left, right, task, items, generator.random(20), generator.random(20)))
                features.append(pair_features(table, left, right, task))
    utilities = np.array([[c.arms[arm].mean() for arm in ("linear", "ties")] for c in contexts])
    dataset = SelectionDataset(tuple(contexts), ("linear", "ties"), table.columns, np.array(features), utilities)
    config = TrainConfig(num_members=2, num_epochs=5)
    train_selector(dataset, config).write(root / "selector")
    restricted = dataset.restricted(SecondOrder(table).columns)
    assert restricted.columns == SecondOrder(table).columns
    train_selector(restricted, config).write(root / "selector" / SHORTLIST)
    return root


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
