"""Rewarded decisions of the log, as training data and as labels.

The log is read once, in pages, strictly by sequence. A voided reward does not count, whenever the void came; decisions
without a reward are left out, those that were closed as infeasible become labels without a utility.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.errors import InputError, LabelError
from simmerge_ray.base.storage import digest_json
from simmerge_ray.plans.keeping import KEEP, arm_plan
from simmerge_ray.plans.plan import MergePlan, plan_from_json
from simmerge_ray.search.labels import EvaluationSettings, Infeasible, LabeledPlan, Measured
from simmerge_ray.selector.data.orders import heads_of
from simmerge_ray.selector.data.rewards import RewardedMerge
from simmerge_ray.service.log.event_log import EventLog
from simmerge_ray.service.log.events import DecisionMade, EventRow
from simmerge_ray.service.log.fold import Decisions, Setup, setups_of

PAGE = 512
INFEASIBLE = "infeasible"  # how the reason of a close begins when the merge cannot be made


@dataclass(frozen=True, eq=False)
class Rewarded:
    """seq: of the reward. plan: what was chosen, a pair's merge, one of the pair as it is, or several steps. tasks:
    that `utility` is of."""

    seq: int
    decision: DecisionMade
    utility: float
    plan: MergePlan
    tasks: tuple[str, ...]

    @property
    def arm(self) -> str:
        """That of the last step, or `keep`."""
        return self.plan.steps[-1].arm.label if self.plan.is_merge else KEEP

    @property
    def pair(self) -> tuple[str, str]:
        """The checkpoints of a pair, as the decision's features have them: a kept one first."""
        left, right = self.decision.request["left"], self.decision.request["right"]
        return (right, left) if self.plan.source == right else (left, right)

    @property
    def drawn(self) -> bool:
        """Whether it may serve off-policy estimates: an arm of a pair, drawn with the propensities that it has."""
        return self.decision.explored and self.decision.request["kind"] == "pair"


@dataclass(frozen=True)
class LoggedMerges:
    """head: the last event that was read. rewarded: by the number of their rewards. infeasible: plan, tasks, reason.

    setups: which selectors answered, in order.
    """

    head: int
    rewarded: tuple[Rewarded, ...]
    infeasible: tuple[tuple[MergePlan, tuple[str, ...], str], ...]
    setups: tuple[Setup, ...]


def all_rows(log: EventLog, after: int = 0) -> Iterator[EventRow]:
    """All events that follow number `after`, up to the present head. Raises StoreError."""
    last, seq = log.head(), after
    while seq < last:
        for row in log.tail(seq, PAGE, last):
            yield row
            seq = row.seq


def logged_merges(rows: Iterable[EventRow]) -> LoggedMerges:
    """What a log says about merges. Raises LabelError: a decision that retraining cannot read."""
    decisions = Decisions(lambda row: row.decoded(DecisionMade))

    def read() -> Iterator[EventRow]:
        for row in rows:
            decisions.apply(row)
            yield row

    setups = tuple(setups_of(read()))
    given, closed = {}, {}
    for course in decisions.courses.values():
        if course.reward is not None:
            given[course.reward[0]] = course.decision, course.reward[1]
        elif course.closed is not None and course.closed[1].startswith(INFEASIBLE):
            closed[course.closed[0]] = course.decision, course.closed[1]
    rewarded = [Rewarded(seq, one, utility, *_asked(one)) for seq, (one, utility) in sorted(given.items())]
    infeasible = [(*_asked(one), reason) for _, (one, reason) in sorted(closed.items())]
    return LoggedMerges(decisions.seq, tuple(rewarded), tuple(infeasible), setups)


def _asked(decision: DecisionMade) -> tuple[MergePlan, tuple[str, ...]]:
    """The plan that was chosen, and the tasks that its reward is about."""
    request = decision.request
    try:
        if request["kind"] == "plan":
            plan = plan_from_json(request["plan"])
        else:
            plan = arm_plan(request["left"], request["right"], decision.arm)
        return plan, tuple(request["tasks"])
    except (KeyError, TypeError, InputError) as error:
        raise LabelError(f"decision {decision.decision_id!r} cannot be read for retraining: {error}") from None


def training_rewards(rewarded: Sequence[Rewarded], arms: Sequence[str], num_features: int) -> list[RewardedMerge]:
    """Rewards that a selector of these arms learns from: the arm is that of the last step, whose features are logged,
    as the score of a plan is predicted from these, or `keep` where it has that. Of plans that were logged with other
    features only labels are made.
    Raises LabelError: a pair's features are of another number, so the new encoder could not fold the log.
    """
    found, heads = [], heads_of(arms)
    for one in rewarded:
        features, arm, wanted = one.decision.features, one.arm, (len(one.tasks), 2, num_features)
        if features.shape == wanted:
            if arm in heads:
                members = one.plan.members if one.plan.is_merge else one.pair
                found.append(RewardedMerge(members, one.tasks, arm, one.utility, features))
        elif one.decision.learns and one.decision.request["kind"] == "pair":
            raise LabelError(
                f"decision {one.decision.decision_id!r} was logged with features of the shape {features.shape}; with "
                f"{len(one.tasks)} tasks and these signals it must be {wanted}: retrain with the service's signals"
            )
    return found


def reward_labels(logged: LoggedMerges, namespace: str, digests: Mapping[str, str]) -> list[LabeledPlan]:
    """A label for each plan and set of tasks; its items are the rewards, in their order. A reward of a kept checkpoint
    is a label of that checkpoint alone.

    Their settings say where they are from, so that they are not mixed with labels of known items.

    digests: contents of the checkpoints, by id; one that is not known is left out.
    """
    items: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    plans: dict[str, MergePlan] = {}
    reasons: dict[tuple[str, tuple[str, ...]], str] = {}
    for one in logged.rewarded:
        plans[one.plan.id] = one.plan
        items.setdefault((one.plan.id, one.tasks), []).append(one.utility)
    for plan, tasks, reason in logged.infeasible:
        plans[plan.id] = plan
        if (plan.id, tasks) not in items:
            reasons[plan.id, tasks] = reason
    settings = EvaluationSettings(f"rewards of {namespace}", "", 0)

    def label(plan_id: str, tasks: tuple[str, ...], outcome: Measured | Infeasible) -> LabeledPlan:
        plan = plans[plan_id]
        known = {name: digests[name] for name in sorted(set(plan.members)) if name in digests}
        return LabeledPlan(
            plan, " + ".join(tasks), digest_json(["rewards", namespace, tasks]), outcome, settings, known
        )

    measured = [label(*key, Measured(np.array(values))) for key, values in items.items()]
    return measured + [label(*key, Infeasible(reason)) for key, reason in reasons.items()]
