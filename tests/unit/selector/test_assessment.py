"""The assessment finds the planted signal and says what it cannot measure; its report is written from JSON alone."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from simmerge_ray.base.config import TrainConfig
from simmerge_ray.base.errors import ConfigError, LabelError
from simmerge_ray.base.progress import Narrator
from simmerge_ray.cli.app import app
from simmerge_ray.pipelines.stages import train_dataset_stage
from simmerge_ray.reports.training import write_selector_report
from simmerge_ray.selector.assessment.report import (
    ONE_MODEL_UNSEEN,
    RANDOM_PAIR,
    UNSEEN_BASE,
    UNSEEN_DOMAIN,
    assess,
    calibration,
    permuted_columns,
)
from simmerge_ray.selector.data.dataset import SelectionDataset, join_datasets
from simmerge_ray.selector.models.model import read_selector
from tests.unit.selector.made_up import COLUMNS, planted, write_study

pytestmark = pytest.mark.slow

# One penalty, one number of neighbours: choosing them is most of the time, and is not tested here.
FAST = TrainConfig(
    model="ridge", num_members=1, num_epochs=40, num_trees=4, penalties=(10.0,), neighbours=(8,), num_folds=4
)


@pytest.fixture(scope="module")
def assessment():
    steps = []
    found = assess(planted(8), FAST, report=lambda done, total: steps.append((done, total)))
    assert steps == [(i, steps[-1][1]) for i in range(1, steps[-1][1] + 1)]
    return json.loads(json.dumps(found, allow_nan=False))


def test_a_brief_report_says_the_same_of_what_it_says(assessment):
    brief = json.loads(json.dumps(assess(planted(8), FAST, brief=True), allow_nan=False))
    assert "importance" not in brief and brief["headline"] == assessment["headline"]
    assert brief["splits"][brief["headline"]] == assessment["splits"][brief["headline"]]
    rows = assessment["ablations"]["rows"]
    assert brief["ablations"]["rows"] == [row for row in rows if row["group"] != "model"]
    others = [name for name, split in brief["splits"].items() if "policies" in split and name != brief["headline"]]
    assert others
    for name in others:
        whole = assessment["splits"][name]["policies"]["per_merge"]["policies"]
        few = brief["splits"][name]["policies"]["per_merge"]["policies"]
        assert len(few) < len(whole) and all(figures == whole[policy] for policy, figures in few.items())


def test_the_family_of_the_planted_signal_is_the_important_one(assessment):
    change = {row["family"]: row["change"] for row in assessment["importance"]["rows"]}
    assert min(change, key=lambda family: change[family]) == "task vectors" and change["task vectors"] < -0.1
    assert all(abs(value) < 0.1 for family, value in change.items() if family != "task vectors")


def test_ablations_lose_what_is_left_out(assessment):
    rows = {(row["group"], row["name"]): row for row in assessment["ablations"]["rows"]}
    assert rows["signals", "no weights"]["change_interval"][1] < 0
    assert rows["signals", "no probes"]["gain_interval"][0] > 0
    assert rows["model", "ridge"]["change"] == 0.0
    assert "without a base" in assessment["ablations"]["missing"]["task encoding: probe_stats"]


def test_splits_that_are_not_possible_say_why(assessment):
    splits = assessment["splits"]
    assert assessment["headline"] == ONE_MODEL_UNSEEN and "predictions" not in splits[RANDOM_PAIR]
    assert "one base" in splits[UNSEEN_BASE]["reason"] and "three tasks" in splits[UNSEEN_DOMAIN]["reason"]


def test_leads_and_tasks_agree_with_the_gains(assessment):
    part = assessment["splits"][ONE_MODEL_UNSEEN]["policies"]["per_merge"]
    selector = part["policies"]["selector"]
    assert part["lead"]["best fixed"]["gain"] == pytest.approx(selector["gain"])
    assert part["lead"]["best fixed"]["gain_interval"] == pytest.approx(selector["gain_interval"])
    of_tasks = [one["gap_closed"] for one in selector["tasks"].values()]
    assert selector["gap_closed"] == pytest.approx(np.mean(of_tasks))


def test_the_report_names_everything(assessment, tmp_path):
    text = write_selector_report(assessment, tmp_path).read_text()
    for words in ("## Selection", "## Ablations", "not measured; the labels are of one base", "lies above zero"):
        assert words in text
    for name in ("domains", "calibration", "importance", "signals"):
        assert f"figures/{name}.png" in text and (tmp_path / "figures" / f"{name}.png").stat().st_size > 5000


def test_two_bases_are_left_out_in_turn(tmp_path):
    def of_base(name: str, seed: int) -> SelectionDataset:
        part = planted(5, seed=seed)
        renamed = [dataclasses.replace(c, left=name + c.left, right=name + c.right) for c in part.contexts]
        return dataclasses.replace(part, contexts=tuple(renamed))

    dataset = join_datasets([of_base("a", 0), of_base("b", 1)])
    base_of = {f"{base}c{i}": base for base in "ab" for i in range(5)}
    found = assess(dataset, FAST, base_of=base_of)
    assert found["headline"] == UNSEEN_BASE and found["bases"] == {"a": 5, "b": 5}
    assert found["splits"][UNSEEN_BASE]["folds"] == ["a", "b"]
    assert "without a base" in found["ablations"]["missing"]["task encoding: probe_stats"]


def test_too_few_labels_give_a_report_of_reasons(tmp_path):
    found = assess(planted(4).subset(range(10)), FAST)
    assert "too few" in found["ablations"]["reason"]
    assert "Not measured: " in write_selector_report(found, tmp_path).read_text()


def test_permuted_columns_move_with_their_pair_and_leave_the_rest():
    dataset = planted(6)
    moved = permuted_columns(dataset, range(len(dataset.contexts)), [5], np.random.default_rng(0)).features
    np.testing.assert_array_equal(moved[..., :5], dataset.features[..., :5])
    assert sorted(moved[:, 0, 5]) == sorted(dataset.features[:, 0, 5]) and (moved != dataset.features).any()
    assert len(COLUMNS) == moved.shape[-1]


def test_right_predictions_lie_on_the_diagonal():
    values = np.random.default_rng(0).random((30, 4))
    for bins in calibration(values, values, 2).values():
        assert sum(one["count"] for one in bins) == 120
        assert all(one["predicted"] == pytest.approx(one["measured"]) for one in bins)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"), ("s1", "s2"))


def train(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_stage_writes_selector_and_report_once(study, tmp_path):
    def told() -> str:
        said = io.StringIO()
        narrator = Narrator(Console(file=said, width=200))
        train_dataset_stage(study, tmp_path / "out", FAST, narrator, ["ties", "linear"])
        return said.getvalue()

    first = told()
    assert "2 bases" in first and UNSEEN_BASE in first
    selector = read_selector(tmp_path / "out")
    assert selector.arms == ("linear", "ties") == read_selector(tmp_path / "out" / "shortlist").arms
    assert {"report.md", "assessment.json", "parents.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "unchanged" in told()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("nowhere",), ConfigError, "no data set at nowhere"),
        (("--signals", "s.parquet"), ConfigError, "both --signals and --labels"),
        (("STUDY", "--labels", "l"), ConfigError, "DATASET alone"),
        (("STUDY", "--arm", "tees"), LabelError, "did you mean 'ties'"),
        (("STUDY", "--arm", "ties"), LabelError, "1 arms are too few"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(study, tmp_path, arguments, error, message):
    given = [str(study) if one == "STUDY" else one for one in arguments]
    result = train(*given, "--out", tmp_path / "out", "--log", tmp_path / "log")
    assert isinstance(result.exception, error) and message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_study_of_several_bases_is_trained_on_with_one_command(study, tmp_path):
    out = tmp_path / "out"
    options = ("--model", "ridge", "--task-encoding", "probe_stats", "--out", out, "--log", tmp_path / "log")
    result = train(str(study), *options)
    assert result.exit_code == 0 and (out / "report.md").read_text()
    selector = read_selector(out)
    assert selector.fitted.encoding.kind == "probe_stats" and len(selector.fitted.encoding.centre) == 2
    rows = json.loads((out / "assessment.json").read_text())["ablations"]["rows"]
    assert {"none", "onehot", "probe_stats"} <= {row["name"] for row in rows}


def test_bad_input_ends_with_code_two(tmp_path, simmerge):
    result = simmerge("train", tmp_path / "none", "--out", tmp_path / "out")
    assert result.returncode == 2 and "no data set at" in result.stderr and "Traceback" not in result.stderr
    result = simmerge("train", tmp_path, "--out", tmp_path / "out", "--model", "tree")
    assert result.returncode == 2 and "'tree' is not one of 'mlp', 'ridge', 'knn', 'forest'" in result.stderr
