"""Keeping a checkpoint as it is: a choice beside every merge of a pair. No torch.

`keep(left)` and `keep(right)` are arms of an ordered pair and each other's mirror image: swapping the pair swaps them.
Wherever there are both they stand last. Whoever is told an answer never learns which checkpoint was called left: there
the arm is `keep(ID)`, and its plan is that of the unmerged checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from simmerge_ray.plans.operators.specs import parse_arm
from simmerge_ray.plans.plan import MergePlan, pair_plan

KEEP = "keep"  # both arms together: what is asked for, and what is learned
KEEP_ARMS = ("keep(left)", "keep(right)")


def keeps(arms: Sequence[str]) -> bool:
    """Whether both parents as they are stand among the arms."""
    return tuple(arms[-2:]) == KEEP_ARMS


def merge_arms(arms: Iterable[str]) -> tuple[str, ...]:
    """Those that merge."""
    return tuple(arm for arm in arms if arm not in KEEP_ARMS)


def keep_label(checkpoint_id: str) -> str:
    """What keeping a checkpoint is called in answers."""
    return f"{KEEP}({checkpoint_id})"


def named_arms(arms: Sequence[str], left: str, right: str) -> tuple[str, ...]:
    """The arms of a pair as answers call them, in their order."""
    names = dict(zip(KEEP_ARMS, map(keep_label, (left, right)), strict=True))
    return tuple(names.get(arm, arm) for arm in arms)


def arm_plan(left: str, right: str, arm: str) -> MergePlan:
    """The plan of an arm of a pair as answers call it. Raises OperatorError: it is neither an operator nor `keep` of
    one of the two."""
    for name in (left, right):
        if arm == keep_label(name):
            return MergePlan(source=name)
    return pair_plan(left, right, parse_arm(arm))
