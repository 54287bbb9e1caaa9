"""`simmerge plan` with a selector that may keep a parent, and `simmerge merge` of what it wrote."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from simmerge_ray.base.storage import read_json
from simmerge_ray.cli.app import app
from simmerge_ray.plans.plan import MergePlan, read_plan
from simmerge_ray.selector.models.model import read_selector
from simmerge_ray.selector.planning.files import SHORTLIST
from tests.artifacts import write_artifacts


@pytest.fixture(scope="module")
def run(catalogue_path, tmp_path_factory):
    """A selector that takes what it predicts to be best, and that is a parent."""
    root = write_artifacts(tmp_path_factory.mktemp("run"), catalogue_path, keep=True)
    selector = read_selector(root / "selector")
    bold = replace(selector.override, threshold=0.0)
    known = replace(selector.novelty, limit=1e9)
    replace(selector, override=bold, novelty=known).write(root / "bold")
    shutil.copytree(root / "selector" / SHORTLIST, root / "bold" / SHORTLIST)
    return root


def invoke(run, catalogue_path, *options: str) -> str:
    fixed = ["plan", str(catalogue_path), "--selector", str(run / "bold"), "--signals", str(run / "pairs.parquet")]
    result = CliRunner().invoke(app, [*fixed, *options], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_plan_of_a_pair_keeps_a_checkpoint_by_its_name_and_is_made_by_copying_it(run, catalogue_path, tmp_path):
    said = invoke(run, catalogue_path, "--left", "m0", "--right", "m1", "--out", str(tmp_path / "plan.json"))
    resolved, predicted = read_plan(tmp_path / "plan.json")
    kept = resolved.plan.source
    assert kept in ("m0", "m1") and resolved.plan == MergePlan(source=kept) and predicted
    assert f"take keep({kept})" in said and "keep(left)" not in said and "keep(right)" not in said
    assert "no merge is needed" in said and f"simmerge merge {tmp_path / 'plan.json'}" in said.replace("\n", "")
    assert all(name in said for name in ("keep(m0)", "keep(m1)", "linear", "ties"))
    # The other way round it keeps the same one.
    turned = invoke(run, catalogue_path, "--left", "m1", "--right", "m0")
    assert f"take keep({kept})" in turned
    out = tmp_path / "out"
    merged = CliRunner().invoke(app, ["merge", str(tmp_path / "plan.json"), str(out)], catch_exceptions=False)
    assert merged.exit_code == 0 and f"keep {kept}" in merged.output
    (source,), (copy,) = (sorted(p.glob("*.safetensors")) for p in (resolved.checkpoints[0].path, out))
    theirs, ours = load_file(source), load_file(copy)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)


def test_plans_of_a_catalogue_are_merges(run, catalogue_path, tmp_path):
    said = invoke(run, catalogue_path, "--ways", "2-3", "--propagator", "second_order", "--out", str(tmp_path))
    assert "of a pair (--left, --right) the selector also says" in said
    ranking = read_json(tmp_path / "ranking.json")
    assert ranking["plans"] and all(one["plan"]["steps"] for one in [*ranking["plans"], ranking["best_fixed"]])
