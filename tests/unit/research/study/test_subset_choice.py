from __future__ import annotations

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from simmerge_ray.base.errors import LabelError
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, fold_plan
from simmerge_ray.research.study.longer import unmerged_utilities
from simmerge_ray.research.study.subset_choice import compare_subsets, labelled_choices, relative_prediction
from simmerge_ray.search.labels import EvaluationSettings, LabeledPlan, Measured

ARMS = (make_arm("linear"), make_arm("ties", {"density": 0.5}))
LABELS = [arm.label for arm in ARMS]
OWN = {"a": "math", "b": "code", "c": "math"}
SUBSETS = [subset for size in (2, 3) for subset in combinations(OWN, size)]
# What merges reach on all tasks, by subset and arm; a and c are the most similar, b and c individually best.
REACHED = {("a", "b"): (0.7, 0.9), ("a", "c"): (0.5, 0.3), ("b", "c"): (0.6, 0.4), ("a", "b", "c"): (0.8, 0.2)}
COSINES = {("a", "b"): 0.1, ("a", "c"): 0.9, ("b", "c"): 0.2}


def label(plan: MergePlan, task: str, utility: float) -> LabeledPlan:
    items = np.repeat([1.0, 0.0], [round(10 * utility), 10 - round(10 * utility)])
    return LabeledPlan(plan, task, "t", Measured(items), EvaluationSettings("transformers", "float32", 64), {})


@pytest.fixture
def catalogue() -> Catalogue:
    return Catalogue(tuple(CheckpointRef(n, Path(n), "base") for n in OWN), OWN, CheckpointRef("base", Path("base")))


@pytest.fixture
def labels() -> list[LabeledPlan]:
    found = [label(MergePlan(source="base"), task, 0.0) for task in ("math", "code")]
    for name, (math, code) in {"a": (1.0, 0.0), "b": (0.3, 1.0), "c": (0.9, 0.2)}.items():
        found += [label(MergePlan(source=name), "math", math), label(MergePlan(source=name), "code", code)]
    for subset in SUBSETS:
        for arm, utility in zip(ARMS, REACHED[subset], strict=True):
            tasks = {OWN[name] for name in subset}
            found += [label(fold_plan(subset, [arm]), task, utility) for task in sorted(tasks)]
    return found


def table() -> Any:
    def get(left: str, right: str, task: str) -> Any:
        return SimpleNamespace(features={"task_vector_cosine_global": COSINES[tuple(sorted((left, right)))]})

    return SimpleNamespace(tasks=("math", "code"), get=get)


def test_every_subset_must_be_labelled(labels, catalogue):
    assert {choice.subset for choice in labelled_choices(labels, catalogue, list(OWN), LABELS)} == set(SUBSETS)
    without = [one for one in labels if set(one.plan.members) != {"a", "c"}]
    with pytest.raises(LabelError, match=r"a \+ c"):
        labelled_choices(without, catalogue, list(OWN), LABELS)
    assert len(labelled_choices(without, catalogue, ["a", "b"], LABELS)) == 2
    assert len(labelled_choices(without, catalogue, ["a", "b"], LABELS[:1])) == 1


def test_predictions_are_pooled_like_measurements(labels, catalogue):
    utilities = unmerged_utilities(labels)
    assert relative_prediction({"math": (0.5, 0.1), "code": (0.7, 0.1)}, utilities, catalogue) == pytest.approx(0.5)
    utilities["math"]["a"] = utilities["math"]["c"] = 0.8  # the best there
    assert relative_prediction({"math": (0.5, 0.1), "code": (0.7, 0.1)}, utilities, catalogue) == pytest.approx(0.55)
    assert relative_prediction({"code": (0.7, 0.1)}, utilities, catalogue) == pytest.approx(0.6)
    nothing = {"code": dict.fromkeys(utilities["code"], 0.0)}
    assert np.isnan(relative_prediction({"code": (0.7, 0.1)}, nothing, catalogue))


def test_regret_of_every_policy(labels, catalogue):
    choices = labelled_choices(labels, catalogue, list(OWN), LABELS)
    predicted = {choice.plan.id: choice.relative if len(choice.subset) == 2 else -1.0 for choice in choices}
    rows = compare_subsets(choices, predicted, "linear", table(), unmerged_utilities(labels), catalogue)
    pairs = {row["policy"]: row for row in rows if row["size"] == 2}
    assert pairs["predicted"]["chosen"] == ["a", "b"] and pairs["predicted"]["regret"] == 0.0
    assert pairs["predicted subset, best fixed arm"]["regret"] == pytest.approx(0.2)
    assert pairs["most similar"]["chosen"] == ["a", "c"] and pairs["most similar"]["regret"] == pytest.approx(0.4)
    assert pairs["individually best"]["chosen"] == ["b", "c"]
    assert pairs["any"]["regret"] == pytest.approx(0.9 - np.mean([0.7, 0.9, 0.5, 0.3, 0.6, 0.4]))
    assert {row["size"] for row in rows} == {2, 3, "any"}
    anything = {row["policy"]: row for row in rows if row["size"] == "any"}
    assert anything["predicted"]["chosen"] == ["a", "b"]
