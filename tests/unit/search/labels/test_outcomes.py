"""Keys, and labels that may be compared."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from simmerge_ray.base.errors import LabelError
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, pair_plan
from simmerge_ray.plans.recipe import recipe_of
from simmerge_ray.search.labels import (
    EvaluationSettings,
    Measured,
    check_comparable,
    measures_arm,
    pair_contexts,
    used_digests,
)
from tests.unit.search.labels.made_up import (
    label,
    pair_labels,
)


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


def test_other_weights_and_seeds_do_not_stand_for_an_arm():
    (linear,) = pair_plan("a", "b", make_arm("linear")).steps
    others = [
        MergePlan((dataclasses.replace(linear, weight=0.3),)),
        MergePlan((dataclasses.replace(linear, weight=(0.5, 0.2)),)),
        MergePlan((linear,), seed=1),
    ]
    others = [label(plan, outcome=Measured(np.zeros(4))) for plan in others]
    labels = pair_labels()
    for order in ([*labels, *others], [*others, *labels]):
        (context,) = pair_contexts(order, ["linear"])
        assert context.arms["linear"].mean() == 0.75
    assert pair_contexts([*labels[1:], *others], ["linear"]) == []


def test_the_recipe_that_is_an_arm_stands_for_it_and_other_recipes_do_not():
    def of(arm, **weights):
        return label(MergePlan(recipe=recipe_of(make_arm(arm), weights)), outcome=Measured(np.full(4, 0.25)))

    labels = pair_labels()
    same = of("linear", b=1.0, a=1.0)
    assert measures_arm(same) and same.key == labels[0].key
    (context,) = pair_contexts([same, *labels[1:]], ["linear", "nuslerp"])
    assert context.arms["linear"].mean() == 0.25 and (context.left, context.right) == ("a", "b")
    others = [of("linear", a=0.7, b=0.3), of("task_arithmetic", a=1.0, b=0.9), of("linear", a=1.0, b=1.0, c=1.0)]
    assert not any(map(measures_arm, others))
    assert pair_contexts([*labels[1:], *others], ["linear"]) == []


@pytest.mark.parametrize(
    "changes",
    [{"task_digest": "x"}, {"settings": EvaluationSettings("y", "float32", 128)}, {"checkpoints": {"a": "z"}}],
)
def test_labels_that_must_not_be_compared_are_refused(changes):
    with pytest.raises(LabelError, match="different"):
        check_comparable([*pair_labels(), label(MergePlan(source="a"), **changes)])
