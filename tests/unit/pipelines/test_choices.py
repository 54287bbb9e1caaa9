"""Choices for all pairs of a run: which are missing, and what ways of choosing come to, from made-up labels."""

from __future__ import annotations

import numpy as np
import pytest

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.base.storage import write_json
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.pipelines.choices import (
    ANSWER,
    AVERAGE,
    BASE,
    CHOSEN,
    FIXED,
    ORACLE,
    PARENT,
    SELECTOR,
    ChoiceTask,
    MadeChoice,
    choice_file,
    compared_choices,
    missing_choices,
)
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, pair_plan
from simmerge_ray.plans.recipe import recipe_of
from simmerge_ray.search.labels import EvaluationSettings, LabeledPlan, LabelStore, Measured

SETTINGS = EvaluationSettings("fake", "float32", 128)


def scaled(members: dict[str, float]) -> MergePlan:
    return MergePlan(recipe=recipe_of(make_arm("task_arithmetic"), members))


def test_only_choices_of_the_same_inputs_are_taken_as_made(catalogue, catalogue_path, tmp_path):
    probes = load_probe_sets(catalogue_path.parent / "probes")
    task = ChoiceTask(catalogue, probes, FindConfig(), "signatures", tmp_path)
    pairs = catalogue.pairs()
    missing = missing_choices(task, pairs)
    assert [pair for pair, _ in missing] == pairs and len({key for _, key in missing}) == len(pairs)
    for pair, key in missing:
        write_json(choice_file(tmp_path, pair), {"key": key})
    assert missing_choices(task, pairs) == []
    write_json(choice_file(tmp_path, pairs[0]), {"key": "of an older run"})
    assert missing_choices(task, pairs) == missing[:1]
    other = ChoiceTask(catalogue, probes, FindConfig(shortlist=7), "signatures", tmp_path)
    assert [pair for pair, _ in missing_choices(other, pairs)] == pairs


@pytest.fixture
def layout(catalogue, tmp_path) -> RunLayout:
    """Labels of the two pairs of the catalogue with different tasks: an arm's utility is the same on all items."""
    layout = RunLayout(tmp_path)
    write_json(layout.crossval, {"reason": "too few"})
    return layout


def put(store, values: dict[tuple[MergePlan, str], float]) -> None:
    labels = []
    for (plan, task), value in values.items():
        used = dict.fromkeys(plan.members, "digest")
        labels.append(LabeledPlan(plan, task, f"items-{task}", Measured(np.full(4, value)), SETTINGS, used))
    LabelStore(store).append(labels)


def test_every_way_gets_what_was_measured_of_what_it_takes(catalogue, layout):
    pairs = catalogue.pairs()
    linear, ties = make_arm("linear"), make_arm("ties")
    choices, known, made = [], {}, {}
    for number, pair in enumerate(pairs):
        plan, tuned = scaled({pair[0]: 0.7, pair[1]: 0.6}), scaled({pair[0]: 0.9, pair[1]: 0.8})
        choices.append(MadeChoice(pair, plan, tuned, tuned if number == 0 else plan, {}))
        for task in catalogue.tasks_of(pair):
            known |= {(pair_plan(*pair, linear), task): 0.2, (pair_plan(*pair, ties), task): 0.3}
            made |= {(plan, task): 0.6, (tuned, task): 0.8}
    for ref in catalogue.all_refs:
        value = 0.4 if ref.id in catalogue.ids else 0.1
        known |= {(MergePlan(source=ref.id), task): value for task in ("add", "copy")}
    put(layout.labels, known)
    put(layout.choices / "labels", made)
    (first, *_) = pairs
    predictions = [
        {"left": first[0], "right": first[1], "task": task, "predicted": predicted}
        for task, predicted in (("add", [0.5, 0.6]), ("copy", [0.5, 0.1]))  # ties for one, linear for both together
    ]
    write_json(layout.crossval, {"arms": ["linear", "ties"], "predictions": predictions})
    found = compared_choices(layout, SearchConfig(arms=("linear", "ties")), catalogue, choices)
    ways = {row["way"]: row for row in found["ways"]}
    expected = {AVERAGE: 0.2, FIXED: 0.3, SELECTOR: 0.2, CHOSEN: 0.6, PARENT: 0.4, BASE: 0.1, ORACLE: 0.8}
    assert {name: ways[name]["utility"] for name in expected} == pytest.approx(expected)
    assert ways[ANSWER]["utility"] == pytest.approx((0.8 + 0.6 * (len(pairs) - 1)) / len(pairs))
    assert ways[SELECTOR]["num_pairs"] == 1 and ways[CHOSEN]["num_pairs"] == len(pairs)
    assert ways[CHOSEN]["over"][PARENT]["value"] == pytest.approx(0.2)
    assert (found["num_tuned"], found["num_merges"], found["fixed_arms"]) == (1, len(pairs), ["ties"])
    assert found["always_tuned"] == pytest.approx(0.8)


def test_a_selector_that_keeps_a_parent_gets_that_parent_s_utility(catalogue, layout):
    left, right = sorted(catalogue.pairs()[0])
    tasks = catalogue.tasks_of((left, right))
    plan = scaled({left: 0.7, right: 0.6})
    put(layout.labels, {(pair_plan(left, right, make_arm("linear")), task): 0.2 for task in tasks}
        | {(MergePlan(source=ref.id), task): 0.7 if ref.id == right else 0.4
           for ref in catalogue.all_refs for task in tasks})  # fmt: skip
    rows = [{"left": left, "right": right, "task": task, "predicted": [0.1, 0.2, 0.3]} for task in tasks]
    write_json(layout.crossval, {"arms": ["linear", "keep(left)", "keep(right)"], "predictions": rows})
    choice = MadeChoice((left, right), plan, None, plan, {})
    (row,) = compared_choices(layout, SearchConfig(arms=("linear",)), catalogue, [choice])["pairs"]
    assert row[SELECTOR] == pytest.approx(0.7) and row[PARENT] == pytest.approx(0.7)


def test_a_choice_that_could_not_be_measured_is_no_figure(catalogue, layout):
    pair = catalogue.pairs()[0]
    plan = scaled({pair[0]: 0.7, pair[1]: 0.6})
    tasks = catalogue.tasks_of(pair)
    put(layout.labels, {(pair_plan(*pair, make_arm("linear")), task): 0.2 for task in tasks}
        | {(MergePlan(source=ref.id), task): 0.4 for ref in catalogue.all_refs for task in tasks})  # fmt: skip
    found = compared_choices(
        layout, SearchConfig(arms=("linear",)), catalogue, [MadeChoice(pair, plan, None, plan, {})]
    )
    ways = {row["way"]: row for row in found["ways"]}
    assert ways[CHOSEN]["utility"] is None and ways[PARENT]["utility"] == pytest.approx(0.4)
    assert found["pairs"][0][CHOSEN] is None and found["always_tuned"] is None
