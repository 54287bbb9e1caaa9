"""The whole chain, and once more. `make soak` interrupts it in every stage."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from simmerge_ray.base.progress import Narrator
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.base.storage import read_json
from simmerge_ray.checkpoints.headers import read_headers
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.pipelines.choices import read_choice
from simmerge_ray.research.zoo.recipe import ARMS
from simmerge_ray.search.labels import LabelStore, Measured
from simmerge_ray.selector.planning.recommender import Recommender
from tests.e2e.tiny_demo import HELD_OUT, run_tiny_demo


def run_here(layout: RunLayout) -> str:
    """The demo on the tests' own cluster; returns what it printed."""
    printed = io.StringIO()
    run_tiny_demo(layout, Narrator(Console(file=printed, width=200)))
    return printed.getvalue()


def modified(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_demo_leaves_what_it_promises_and_the_next_run_computes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a relative path, as users give it: workers of Ray may run in another directory
    layout = RunLayout(Path("run"))
    output = run_here(layout)
    for stage in ("zoo", "signals", "search", "train", "choices", "pick", "report"):
        assert f"\n{stage}" in f"\n{output}"
    labels = LabelStore(layout.labels).read()
    num_merges = 5 * len(ARMS)  # cross-task pairs but the held-out one
    assert len(labels) == 5 * 4 + num_merges * 2  # the base and its experts on four tasks, merges on two

    # A choice for every pair, measured for those that have labels; all that was chosen has both parents' tasks.
    choices = read_json(layout.choices / "choices.json")
    assert len(choices["pairs"]) == 5 and set(HELD_OUT) not in [set(row["pair"]) for row in choices["pairs"]]
    utilities = {row["way"]: row["utility"] for row in choices["ways"]}
    assert utilities.pop("paper's selector") is None  # too few pairs to train without a checkpoint
    assert len(utilities) == 7 and None not in utilities.values()
    chosen = LabelStore(layout.choices / "labels").read()
    assert {*HELD_OUT} not in [set(label.plan.members) for label in chosen]
    assert all(isinstance(label.outcome, Measured) for label in chosen)

    # The merge measured after the pick, the figures, the manifests.
    pick = read_json(layout.pick / "pick.json")
    assert set(pick["pair"]) == set(HELD_OUT) and len(pick["measured"]["arms"]) == len(ARMS)
    assert pick["arm"] in pick["measured"]["arms"] and set(pick["measured"]["checkpoints"]) == {*HELD_OUT, "base"}
    assert pick["answer"]["plan"] == read_choice(layout.choices, HELD_OUT).answer.to_json()
    choice = Recommender.load(layout.selector, layout.signals).recommend(*HELD_OUT).choice
    assert (pick["arm"], pick["reason"]) == (choice.arm, choice.reason)  # what `simmerge plan --left --right` says
    assert {*HELD_OUT} not in [set(label.plan.members) for label in labels]
    read_headers(CheckpointRef("merged", layout.pick / "merged"))
    card = (layout.pick / "merged" / "README.md").read_text()
    assert "measured utility" in card and "kept by the merge" in card and "predicted" not in card
    for figure in ("signals.png", "choices.png", "pick.png"):
        assert (layout.report / figure).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    report = (layout.report / "report.md").read_text()
    assert "## The pick for math-few + rag-few: " in report and "20 items of math" in report
    for manifest in (layout.zoo / "zoo.json", layout.signals.with_suffix(".json"), layout.found / "search.json"):
        assert {"config", "inputs", "versions", "seconds"} <= set(read_json(manifest))

    # A run that finds everything in place computes nothing.
    made = (layout.labels, layout.zoo, layout.choices, layout.pick)
    written = {path: time for directory in made for path, time in modified(directory).items()}
    output = run_here(layout)
    assert output.count("unchanged since the last run") == 6, output
    assert {path: time for directory in made for path, time in modified(directory).items()} == written
