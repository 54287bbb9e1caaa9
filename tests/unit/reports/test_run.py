"""The report of a run, from a small made-up run directory: what it says of each part, and of what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.base.storage import read_json, write_json
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, pair_plan
from simmerge_ray.reports.run import write_report
from simmerge_ray.search.headroom import headroom
from simmerge_ray.search.labels import EvaluationSettings, LabeledPlan, LabelStore, Measured
from tests.tables import synthetic_table
from tests.unit.selector.made_up import planted

CROSSVAL = {
    "arms": ["linear", "ties"],
    "num_contexts": 12,
    "num_defined": 10,
    "min_items": 40,
    "per_merge": {"uniform": 0.1, "best_fixed": 0.2, "selector": 0.35, "oracle": 0.5, "gain": 0.15},
    "per_context": {"uniform": 0.1, "best_fixed": 0.25, "selector": 0.2, "oracle": 0.6, "gain": -0.05},
    "predictions": [{"predicted": [0.4, 0.6], "measured": [0.5, 0.7]}, {"predicted": [0.3, 0.2], "measured": [0, 0.1]}],
}
PICK = {
    "pair": ["m0", "m1"],
    "answer": {"label": "tuned: m0 + m1", "plan": {}, "is_tuned": True},
    "keeps": {"m0 on add": 0.9, "m1 on copy": 0.75},
    "arm": "ties",
    "reason": "it is predicted to gain",
    "best_fixed": "linear",
    "predicted": {"linear": {"utility": 0.5, "sd": 0.02}, "ties": {"utility": 0.6, "sd": 0.03}},
    "measured": {
        "arms": {"linear": {"add": 0.4, "copy": 0.6}, "ties": {"add": 0.7, "copy": 0.5}},
        "checkpoints": {
            "m0": {"add": 0.9, "copy": 0.1},
            "m1": {"add": 0.2, "copy": 0.6},
            "base": {"add": 0.3, "copy": 0.3},
        },
        "chosen": {"chosen without labels": {"add": 0.8, "copy": 0.5}, "chosen and tuned": {"add": 0.8, "copy": 0.6}},
    },
    "loaded": {"add": {"transformers": 0.71}, "copy": {"transformers": 0.5, "vllm": 0.52}},
    "num_items": {"add": 20, "copy": 24},
}
CHOICES = {
    "ways": [
        {"way": "plain average", "num_pairs": 9, "utility": 0.7, "interval": [0.65, 0.75], "over": {}},
        {"way": "paper's selector", "num_pairs": 0, "utility": None, "interval": None,
         "over": {"plain average": {"num_pairs": 0, "value": None, "interval": None}}},
        {"way": "chosen without labels", "num_pairs": 8, "utility": 0.85, "interval": [0.8, 0.9],
         "over": {"plain average": {"num_pairs": 8, "value": 0.15, "interval": [0.1, 0.2]}}},
    ],
    "pairs": [{"pair": ["m0", "m1"]}] * 9,
    "num_arms": 4,
    "num_merges": 7,
    "num_tuned": 5,
    "always_tuned": 0.861,
    "fixed_arms": ["ties"],
}  # fmt: skip


@pytest.fixture
def layout(tmp_path) -> RunLayout[Path]:
    return RunLayout(tmp_path / "run")


def told(layout: RunLayout[Path]) -> str:
    return write_report(layout).read_text()


def crossval(merge: tuple[float, float] | None, context: tuple[float, float] | None) -> dict:
    parts = {"per_merge": merge, "per_context": context}
    return CROSSVAL | {name: CROSSVAL[name] | {"gain_interval": interval} for name, interval in parts.items()}


def write_headroom(layout: RunLayout[Path]) -> dict:
    room = headroom(planted().contexts, num_resamples=100).to_json()
    write_json(layout.headroom, room)
    return room


def test_a_directory_without_a_run_is_refused(layout):
    with pytest.raises(ConfigError, match="holds neither signals nor labels"):
        write_report(layout)


def test_signals_alone_make_a_report_with_their_maps_and_nothing_else(layout):
    synthetic_table(3, ("s", "t")).write(layout.signals)
    text = told(layout)
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Signals", "## Made with"]
    assert "means over the 2 tasks' probes" in text
    assert {path.name for path in layout.report.iterdir()} == {
        "report.md", "report.html", "report.json", "signals.png",
    }  # fmt: skip
    assert list(read_json(layout.report / "report.json")["inputs"]) == ["signals/pairs.parquet"]


def test_headroom_is_told_for_both_objectives(layout):
    room = write_headroom(layout)
    text = told(layout)
    for arm, value in room["arm_gap_closed"].items():
        assert f"| {arm} | {value:.3f} | " in text
    for part in (room["per_merge"], room["per_context"]):
        low, high = part["gain_interval"]
        assert f"{part['gain']:+.3f} [{low:+.3f}, {high:+.3f}]" in text
    assert (layout.report / "operators.png").exists()


def test_headroom_that_is_not_defined_says_why(layout):
    write_json(layout.headroom, {"undefined": "no parents differ"})
    text = told(layout)
    assert "Not measured: no parents differ." in text and not (layout.report / "operators.png").exists()


@pytest.mark.parametrize(
    ("interval", "verdict"), [((0.1, 0.2), "better"), ((-0.2, -0.1), "worse"), ((-0.1, 0.2), "not distinguishable")]
)
def test_the_selector_is_judged_by_its_interval(layout, interval, verdict):
    write_headroom(layout)
    write_json(layout.crossval, crossval(interval, None))
    text = told(layout)
    low, high = interval
    gain = f"selector minus best fixed +0.150 [{low:+.3f}, {high:+.3f}], 95 % interval over checkpoints: {verdict}."
    assert f"One arm per merge: {gain}" in text
    assert "One arm per task: selector minus best fixed -0.050 [no interval]" in text and "12 contexts" in text
    assert "| selector | 0.350 | 0.200 |" in text


def test_a_selector_that_was_not_assessed_says_why(layout):
    write_headroom(layout)
    write_json(layout.crossval, {"reason": "too few checkpoints"})
    assert "Not measured: too few checkpoints." in told(layout)


def test_the_pick_is_shown_beside_what_was_measured_later(layout):
    write_headroom(layout)
    write_json(layout.pick / "pick.json", PICK)
    text = told(layout)
    assert "## The pick for m0 + m1: tuned: m0 + m1" in text and "20 items of add, 24 items of copy" in text
    assert "keeps 90 % of the answers of m0 on add, 75 % of the answers of m1 on copy" in text
    assert "| **chosen and tuned** |  | 0.700 | 0.800 | 0.600 |" in text
    assert "| ties, the selector's pick | 0.600 ± 0.030 | 0.600 | 0.700 | 0.500 |" in text
    assert "| linear, best fixed | 0.500 ± 0.020 | 0.500 | 0.400 | 0.600 |" in text
    assert text.index("| ties, the") < text.index("| linear, best fixed") < text.index("| parent m0 |")
    assert "| base |  | 0.300 | 0.300 | 0.300 |" in text
    verdict = (
        "**Measured on both tasks, verdict: merge: tuned: m0 + m1.** The answer measures 0.700, the best checkpoint"
    )
    assert f"{verdict} as it is, m0, 0.500." in text
    better_base = {
        **PICK["measured"],
        "checkpoints": {**PICK["measured"]["checkpoints"], "base": {"add": 1, "copy": 0.8}},
    }
    write_json(layout.pick / "pick.json", PICK | {"measured": better_base})
    assert "verdict: keep base.** The answer measures 0.700, the best checkpoint as it is, base, 0.900." in told(layout)
    assert "add 0.710 (transformers); copy 0.500 (transformers), 0.520 (vllm)" in text


def test_a_pick_that_keeps_a_checkpoint_says_that_nothing_was_merged(layout):
    write_headroom(layout)
    kept = {"label": "m0", "plan": {"source": "m0"}, "is_tuned": False}
    write_json(layout.pick / "pick.json", PICK | {"answer": kept, "loaded": {}})
    text = told(layout)
    assert "## The pick for m0 + m1: m0" in text and "Nothing was merged." in text and "From disk" not in text


def test_ways_of_choosing_stand_in_one_table_with_their_pairs_and_gains(layout):
    write_headroom(layout)
    write_json(layout.choices / "choices.json", CHOICES)
    text = told(layout)
    assert "|  | pairs | utility | minus plain average |" in text
    assert "| plain average | 9 | 0.700 [0.650, 0.750] |  |" in text
    assert "| paper's selector | 0 | - | - |" in text
    assert "| chosen without labels | 8 | 0.850 [0.800, 0.900] | +0.150 [+0.100, +0.200] |" in text
    assert "taken for 5 of the 9 pairs" in text and "taking them always: 0.861" in text
    assert (layout.report / "choices.png").read_bytes()[:4] == b"\x89PNG"
    assert "choices/choices.json" in read_json(layout.report / "report.json")["inputs"]


def test_the_zoo_shows_utilities_with_the_own_task_in_bold(layout, catalogue_path):
    room = write_headroom(layout)
    layout.zoo.symlink_to(catalogue_path.parent)
    settings = EvaluationSettings("fake", "float32", 128)
    utilities = {("m0", "add"): 1.0, ("m0", "copy"): 0.25, ("m1", "copy"): 0.75, ("m2", "add"): 0.5}
    labels = [
        LabeledPlan(MergePlan(source=name), task, f"items-{task}", Measured(np.full(4, value)), settings, {name: name})
        for (name, task), value in utilities.items()
    ]
    LabelStore(layout.labels).append(labels)
    text = told(layout)
    assert "| m0 | **1.000** | 0.250 |" in text
    assert "| m1 |  | **0.750** |" in text and "What the zoo was made to reach" not in text
    assert room["num_contexts"]


def test_a_report_is_made_anew_from_the_same_files(layout):
    write_headroom(layout)
    write_json(layout.crossval, crossval((0.1, 0.2), (0.1, 0.2)))
    assert told(layout) == told(layout)


def test_a_run_of_ones_own_shows_checkpoints_and_measured_merges_on_the_same_tasks(layout):
    settings = EvaluationSettings("fake", "float32", 128)
    merge = pair_plan("a", "b", make_arm("linear"))
    utilities = {
        (MergePlan(source="a"), "s"): 0.5, (MergePlan(source="a"), "t"): 0.1,
        (MergePlan(source="base"), "s"): 0.6, (MergePlan(source="base"), "t"): 0.6,
        (merge, "s"): 0.8, (merge, "t"): 0.5,
        (pair_plan("a", "b", make_arm("ties")), "s"): 0.1,
    }  # fmt: skip
    noise = np.tile([0.0, 0.02], 20)
    labels = [
        LabeledPlan(plan, task, f"items-{task}", Measured(value + noise), settings, dict.fromkeys(plan.members, "x"))
        for (plan, task), value in utilities.items()
    ]
    LabelStore(layout.labels).append(labels)
    text = told(layout)
    assert "1 of 2 measured merges clearly beat the best checkpoint on their tasks" in text
    assert "| linear: a + b | s, t | 0.660 | base | 0.610 | +0.050 ± 0.000 |" in text
    assert "| ties: a + b | s | 0.110 | base | 0.610 | -0.500 ± 0.000 |" in text
    assert "| a | 0.510 | 0.110 |" in text and "| base | 0.610 | 0.610 |" in text
    assert (layout.report / "figures" / "merges.png").exists() and (layout.report / "report.html").exists()
