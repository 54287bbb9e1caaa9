"""Data sets, selectors, plans and reports in a store are what they are on a disk."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO

import pytest
from rich.console import Console
from typer.testing import CliRunner

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import SelectorError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.storage import as_place, read_json
from simmerge_ray.cli.app import app
from simmerge_ray.pipelines.stages import train_dataset_stage, train_stage
from simmerge_ray.plans.plan import read_plan
from simmerge_ray.search.labels import LabelStore
from simmerge_ray.selector.data.dataset import with_keep
from simmerge_ray.selector.data.files import find_dataset, read_dataset
from simmerge_ray.selector.models.model import read_selector
from simmerge_ray.selector.models.train import train_selector
from simmerge_ray.service.registry import Registry
from simmerge_ray.signals.table import read_signal_table
from tests.artifacts import write_artifacts
from tests.unit.selector.made_up import write_study

CONFIG = TrainConfig(model="ridge", num_folds=2, num_members=1, num_epochs=20, num_trees=4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMMERGE_CACHE_DIR", str(tmp_path / "cache"))


def upload(source, target):
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).upload(path)
    return target


def said(call, *arguments) -> str:
    text = StringIO()
    with redirect_stdout(text):
        call(*arguments, Narrator(Console(file=text, width=300)))
    return text.getvalue()


@pytest.mark.slow
def test_a_selector_is_trained_from_a_store_into_a_store_once(bucket, tmp_path):
    local = write_study(tmp_path / "study", ["s1", "s2"])
    remote = upload(local, as_place(bucket) / "study")
    ours, theirs = read_dataset(find_dataset(remote)), read_dataset(find_dataset(local))
    assert ours.base_of == theirs.base_of and len(ours.labels) == len(theirs.labels) > 0
    out = as_place(bucket) / "selector"
    first = said(train_dataset_stage, remote, out, CONFIG)
    assert read_selector(out).version == train_selector(with_keep(theirs.dataset), CONFIG).version
    assert read_selector(out / "shortlist").arms == read_selector(out).arms
    assert str(out / "report.md") in first.replace("\n", "")
    assert "GapClosed" in (out / "report.md").read_text() and len(out.glob("figures/*.png")) > 0
    before = {entry.path: entry.version for entry in out.list_below()}
    assert "unchanged since the last run" in said(train_dataset_stage, remote, out, CONFIG)
    assert {entry.path: entry.version for entry in out.list_below()} == before
    with pytest.raises(SelectorError, match=f"no selector at {bucket}/absent"):
        read_selector(as_place(bucket) / "absent")


def test_one_base_is_trained_with_its_results_beside_it(bucket, tmp_path):
    remote = upload(write_study(tmp_path / "study", ["s1"]), as_place(bucket) / "study")
    signals, labels = remote / "signals" / "s1" / "pairs.parquet", remote / "labels" / "s1"
    out, crossval = as_place(bucket) / "selector", as_place(bucket) / "crossval.json"
    train_stage(signals, labels, out, CONFIG, Narrator(Console(file=StringIO())), None, crossval)
    assert read_selector(out).arms and read_json(crossval)
    registry = Registry(tmp_path / "registry")
    version = registry.publish(out)
    assert version == read_selector(out).version and registry.load(version).selector.arms == read_selector(out).arms
    assert LabelStore(labels).check().problems == ()


def test_plans_are_ranked_with_everything_in_a_store(bucket, catalogue_path, tmp_path):
    run = upload(write_artifacts(tmp_path / "run", catalogue_path), as_place(bucket) / "run")
    catalogue = upload(catalogue_path.parent, as_place(bucket) / "zoo") / "catalogue.yaml"
    fixed = ["plan", str(catalogue), "--selector", f"{run}/selector", "--signals", f"{run}/pairs.parquet"]
    for more, out in ((["--propagator", "virtual"], f"{bucket}/plans"), (["--left", "m0", "--right", "m1"], None)):
        out = out or f"{bucket}/plan.json"
        result = CliRunner().invoke(app, [*fixed, *more, "--out", out], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        place = as_place(out)
        resolved, predicted = read_plan(place if place.suffix else place / "plan-1.json")
        assert predicted and all(str(ref.path).startswith(f"{bucket}/zoo/") for ref in resolved.used_refs)
    assert read_signal_table(f"{run}/pairs.parquet").checkpoint_ids == ("m0", "m1", "m2")


def test_catalogues_are_written_and_shown_in_a_store(bucket, catalogue_path):
    zoo = upload(catalogue_path.parent, as_place(bucket) / "zoo")
    made = f"{bucket}/other.yaml"
    for arguments in (
        ["add", made, "base", f"{zoo}/base", "--base"],
        ["add", made, "m0", f"{zoo}/m0", "--task", "add"],
        ["list", made],
        ["show", made, "m0"],
    ):
        result = CliRunner().invoke(app, ["catalogue", *arguments], env={"COLUMNS": "300"})
        assert result.exit_code == 0, f"{arguments} {result.output} {result.exception}"
    assert "zoo/m0" in result.output
    assert "path: zoo/m0" in as_place(made).read_text()
