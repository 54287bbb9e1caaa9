"""Keeping a checkpoint: what its arms are called, and the plan that they are."""

from __future__ import annotations

import pytest

from simmerge_ray.base.errors import OperatorError
from simmerge_ray.plans.keeping import KEEP_ARMS, arm_plan, keep_label, keeps, merge_arms, named_arms
from simmerge_ray.plans.operators.specs import parse_arm
from simmerge_ray.plans.plan import MergePlan, pair_plan


def test_the_arms_of_a_pair_are_named_by_its_checkpoints():
    arms = ("linear", *KEEP_ARMS)
    assert named_arms(arms, "a", "b") == ("linear", "keep(a)", "keep(b)")
    assert named_arms(arms, "b", "a") == ("linear", "keep(b)", "keep(a)")
    # A checkpoint may be called anything, `left` included: names go by place.
    assert named_arms(arms, "right", "left") == ("linear", "keep(right)", "keep(left)")
    assert named_arms(("linear", "ties"), "a", "b") == ("linear", "ties")


def test_both_parents_stand_among_the_arms_or_neither_does():
    assert keeps(("linear", *KEEP_ARMS)) and not keeps(("linear", "ties")) and not keeps(())
    assert merge_arms(("linear", *KEEP_ARMS)) == ("linear",)


def test_the_plan_of_a_kept_checkpoint_is_the_checkpoint():
    assert arm_plan("a", "b", keep_label("b")) == MergePlan(source="b")
    assert arm_plan("b", "a", "ties") == pair_plan("a", "b", parse_arm("ties"))
    assert arm_plan("b", "a", "keep(b)").to_json() == {"source": "b"}
    for wrong in ("keep(c)", "keep(left)", "keep"):
        with pytest.raises(OperatorError):
            arm_plan("a", "b", wrong)
