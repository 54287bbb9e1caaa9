"""`simmerge labels` as a user calls it."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from simmerge_ray.cli.labels import labels_app
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, pair_plan
from simmerge_ray.search.labels import EvaluationSettings, Infeasible, LabelStore, Measured, Stopped
from tests.unit.search.labels.made_up import label
from tests.unit.test_layers import loaded_by_commands


@pytest.fixture
def store(tmp_path) -> Path:
    """Two measured, one stopped and one infeasible label of `t`, one measured of `u`; a file each."""
    plans = [pair_plan("a", "b", make_arm(name)) for name in ("linear", "ties", "slerp", "nuslerp")]
    outcomes = [
        Measured(np.array([1.0, 0.0])),
        Measured(np.array([1.0, 1.0, 1.0, 0.0])),
        Stopped(np.array([1.0])),
        Infeasible("model.norm.weight holds NaN [at 3]"),
    ]
    labels = [label(plan, outcome=outcome) for plan, outcome in zip(plans, outcomes, strict=True)]
    for one in (*labels, label(MergePlan(source="a"), task="u")):
        LabelStore(tmp_path / "labels").append([one])
    return tmp_path / "labels"


def call(*arguments: str | Path) -> tuple[str, str]:
    """Standard output and standard error of a command that succeeds."""
    result = CliRunner(env={"COLUMNS": "300"}).invoke(labels_app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def table_rows(text: str) -> list[list[str]]:
    """Of the table: below its title and header, above the counts."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()[2:-1]]


def test_show_sorts_by_utility_and_counts_at_the_end(store):
    text, _ = call("show", store)
    rows = table_rows(text)
    assert [row[0] for row in rows] == ["ties: a + b", "a", "linear: a + b", "slerp: a + b", "nuslerp: a + b"]
    assert rows[0] == ["ties: a + b", "t", "0.750 ± 0.250", "4", "measured", "fake", "0.5"]
    assert rows[2][2:4] == ["0.500 ± 0.500", "2"]
    assert rows[3][2:4] == ["1.000 ± 0.000", "1"] and rows[3][4] == "stopped"
    assert rows[4][2:4] == ["-", "0"] and rows[4][4] == "infeasible: model.norm.weight holds NaN [at 3]"
    assert text.splitlines()[-1] == "5 labels: 3 measured, 1 stopped, 1 infeasible; 2 tasks"


def test_show_of_one_task_and_of_the_best(store):
    text, _ = call("show", store, "--task", "t", "--best", "2")
    assert [row[0] for row in table_rows(text)] == ["ties: a + b", "linear: a + b"]
    assert text.splitlines()[-1] == "4 labels: 2 measured, 1 stopped, 1 infeasible; 1 task, the first 2 shown"


def test_formats_for_programs_hold_the_same_rows_and_nothing_else(store):
    text, counts = call("show", store, "--format", "jsonl")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["plan"] for row in rows] == [row[0] for row in table_rows(call("show", store)[0])]
    assert rows[0]["utility"] == 0.75 and rows[0]["num_items"] == 4
    assert {row["key"] for row in rows} == {label.key for label in LabelStore(store).read()}
    assert "5 labels" in counts
    text, counts = call("show", store, "--json")
    assert json.loads(text) == rows and "5 labels" in counts
    text, _ = call("show", store, "--format", "csv")
    found = list(csv.DictReader(io.StringIO(text)))
    assert found == [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]


def test_check_merge_and_compact(store, tmp_path):
    assert call("check", store)[0].splitlines() == [
        "5 labels: 3 measured, 1 stopped, 1 infeasible; 5 files, 0 rows more than labels",
        "no problems",
    ]
    other, into = tmp_path / "other", tmp_path / "into"
    LabelStore(other).append([label(MergePlan(source="a"), task="u"), label(MergePlan(source="b"))])
    text, _ = call("merge", into, store, other)
    assert text.splitlines() == [f"{store}: 5 new labels", f"{other}: 1 new label", f"{into} holds 6 labels"]
    assert call("merge", into, other)[0].splitlines()[0] == f"{other}: 0 new labels"
    assert call("compact", into)[0] == "2 files folded into one\n"
    assert call("compact", into)[0] == "nothing to fold: one file already\n"
    assert len(LabelStore(into).read()) == 6 and len(LabelStore(store).read()) == 5


def test_check_ends_with_code_one_and_says_every_problem(store, simmerge):
    (store / "junk.parquet").write_bytes(b"junk")
    (store / "more.parquet").write_bytes(b"junk")
    result = simmerge("labels", "check", store)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "5 labels" in result.stdout and "no problems" not in result.stdout
    assert result.stderr.startswith(f"error: 2 problems in {store}:\n")
    assert "junk.parquet is not a label file" in result.stderr and "more.parquet" in result.stderr


@pytest.mark.parametrize("command", ["show", "check", "compact"])
def test_a_store_that_is_not_there_or_empty_is_one_clear_error(tmp_path, command, simmerge):
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        result = simmerge("labels", command, name, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stderr == f"error: no label files in {name}; `simmerge labels make ... --out {name}` makes them\n"
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "labels", "absent"], "no label files in absent"),
        (["merge", "into", "labels", "strange"], "strange does not fit into: labels were made with different settings"),
        (["show", "labels", "--task", "v"], "unknown task 'v'"),
        (["show", "labels", "--best", "0"], "--best"),
        (["show", "labels", "--format", "xml"], "--format"),
        (["show", "labels/x.parquet"], "labels/x.parquet is a file"),
        (["compact", "nonsense://labels"], "unknown scheme of a URI 'nonsense'; known: file, gs, s3"),
    ],
)
def test_bad_input_ends_with_code_two_and_writes_nothing(store, arguments, message, simmerge):
    (store / "x.parquet").write_bytes(next(store.glob("*.parquet")).read_bytes())
    strange = EvaluationSettings("another", "float32", 128)
    LabelStore(store.parent / "strange").append([label(MergePlan(source="a"), settings=strange)])
    before = sorted(store.parent.rglob("*"))
    result = simmerge("labels", *arguments, cwd=store.parent)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    assert sorted(store.parent.rglob("*")) == before


def test_the_commands_load_no_heavy_library(store):
    calls = (["--help"], ["show", str(store)], ["check", str(store)], ["compact", str(store)])
    for arguments, loaded in zip(calls, loaded_by_commands(["labels", *call] for call in calls), strict=True):
        assert not loaded & {"torch", "ray", "transformers", "numba", "sklearn", "matplotlib"}, arguments
        assert ("pyarrow" in loaded) == (arguments != ["--help"])
