"""The label store: append-only, one row per key, nothing mixed that must not be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest

from simmerge_ray.errors import LabelError
from simmerge_ray.labels import (
    EvaluationSettings,
    Infeasible,
    LabeledPlan,
    LabelStore,
    Measured,
    check_comparable,
    pair_contexts,
    used_digests,
)
from simmerge_ray.operators.specs import make_arm
from simmerge_ray.plans import MergePlan, pair_plan

SETTINGS = EvaluationSettings("fake", "float32", 128)


def label(plan: MergePlan, task: str = "t", outcome=None, **changes) -> LabeledPlan:
    outcome = outcome or Measured(np.array([1.0, 0.0, 1.0, 1.0]))
    checkpoints = {name: f"digest-{name}" for name in plan.members}
    return dataclasses.replace(LabeledPlan(plan, task, f"items-{task}", outcome, SETTINGS, checkpoints, 0.5), **changes)


def pair_labels(left: str = "a", right: str = "b") -> list[LabeledPlan]:
    merges = [pair_plan(left, right, make_arm(name)) for name in ("linear", "nuslerp")]
    return [label(plan) for plan in (*merges, MergePlan(source=left), MergePlan(source=right))]


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return LabelStore(tmp_path / "labels" if request.param == "local" else f"memory://labels-{tmp_path.name}")


def test_labels_are_read_back_as_written(store):
    labels = [*pair_labels(), label(pair_plan("a", "c", make_arm("linear")), outcome=Infeasible("NaN in x"))]
    store.append(labels[:2])
    store.append(labels[2:])
    again = {found.key: found for found in store.read()}
    assert set(again) == {one.key for one in labels} == store.keys()
    assert all(one.same_as is None for one in again.values())
    for one in labels:
        found = again[one.key]
        assert (found.plan, found.task, found.settings, found.checkpoints) == (
            one.plan,
            one.task,
            one.settings,
            one.checkpoints,
        )
        if isinstance(one.outcome, Measured):
            assert found.outcome.items.tolist() == one.outcome.items.tolist()
            assert found.outcome.utility == 0.75 and found.outcome.standard_error == pytest.approx(0.25)
        else:
            assert found.outcome == one.outcome


def test_writing_twice_leaves_one_row_and_an_empty_store_is_empty(store):
    assert store.read() == []
    for _ in range(2):
        store.append(pair_labels())
    store.append(pair_labels()[:1])
    assert len(store.read()) == 4


def test_a_measured_label_replaces_an_infeasible_one_and_never_the_reverse(store):
    plan = pair_plan("a", "b", make_arm("linear"))
    good, bad = label(plan), label(plan, outcome=Infeasible("engine died"))
    for order in ((bad, good), (good, bad)):
        for one in order:
            store.append([one, label(MergePlan(source=f"x{id(one)}"))])
        assert {type(found.outcome) for found in store.read() if found.plan == plan} == {Measured}


def test_the_key_depends_on_all_that_the_utility_depends_on():
    one = label(pair_plan("a", "b", make_arm("ties")))
    others = [
        label(pair_plan("a", "b", make_arm("linear"))),
        dataclasses.replace(one, task_digest="other items"),
        dataclasses.replace(one, settings=EvaluationSettings("fake", "bfloat16", 128)),
        dataclasses.replace(one, checkpoints={"a": "new upload", "b": "digest-b"}),
    ]
    assert len({one.key, *(other.key for other in others)}) == 5
    assert one.key == label(pair_plan("b", "a", make_arm("ties"))).key == dataclasses.replace(one, seconds=9.0).key


def test_the_base_counts_only_where_an_operator_takes_it():
    digests = {"a": "1", "b": "2", "base": "3"}
    assert set(used_digests(pair_plan("a", "b", make_arm("linear")), digests, "base")) == {"a", "b"}
    assert set(used_digests(pair_plan("a", "b", make_arm("ties")), digests, "base")) == {"a", "b", "base"}


def test_contexts_need_every_arm_and_both_parents():
    labels = pair_labels()
    contexts = pair_contexts(labels, ["linear", "nuslerp"])
    assert [(c.left, c.right, c.task) for c in contexts] == [("a", "b", "t")]
    assert pair_contexts(labels[1:], ["linear", "nuslerp"]) == []
    assert pair_contexts(labels[:3], ["linear"]) == []


@pytest.mark.parametrize(
    "changes",
    [{"task_digest": "x"}, {"settings": EvaluationSettings("y", "float32", 128)}, {"checkpoints": {"a": "z"}}],
)
def test_labels_that_must_not_be_compared_are_refused(changes):
    with pytest.raises(LabelError, match="different"):
        check_comparable([*pair_labels(), label(MergePlan(source="a"), **changes)])


def test_files_that_are_no_labels_are_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"junk")
    with pytest.raises(LabelError, match=r"x.parquet is not a label file"):
        LabelStore(tmp_path).read()


def test_a_copied_label_names_the_plan_that_was_evaluated_and_files_of_before_are_read(tmp_path):
    store = LabelStore(tmp_path)
    store.append([label(pair_plan("a", "b", make_arm("slerp")), same_as="linear: a + b")])
    (found,) = store.read()
    assert found.same_as == "linear: a + b"
    (file,) = tmp_path.glob("*.parquet")
    pq.write_table(pq.read_table(file).drop_columns(["same_as"]), file)
    (found,) = store.read()
    assert found.same_as is None and found.outcome.utility == 0.75
