"""From a request to an event: what is decided for a pair or among plans, and the events of an operator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simmerge_ray.base.errors import BanditError, unknown_name
from simmerge_ray.plans.keeping import KEEP, arm_plan
from simmerge_ray.plans.operators.specs import parse_arm
from simmerge_ray.selector.models.model import Selector
from simmerge_ray.service.bandit.policy import NeuralLinearTS, Noise, SafeRule, Suggestion, num_choices
from simmerge_ray.service.bandit.posterior import GaussianPosterior
from simmerge_ray.service.bandit.warm_start import cold_ridge
from simmerge_ray.service.context import COLD_NOISE, Contexts, PairContext
from simmerge_ray.service.log.events import ArmAdded, DecisionMade, EncoderEpoch
from simmerge_ray.service.log.fold import View
from simmerge_ray.service.planning import DrawnPlan, plan_prediction
from simmerge_ray.service.schemas import (
    ArmPrediction,
    ArmRequest,
    Decision,
    DecisionRequest,
    PlanPrediction,
    Ranked,
    RankRequest,
)


@dataclass(frozen=True)
class Asked:
    """A decision that is asked for. expires_at: after which a first reward is refused; None: never."""

    decision_id: str
    explore: bool
    expires_at: float | None


def noise_of(view: View) -> Noise:
    """Of the rewards."""
    return view.noise or COLD_NOISE


class PolicyCache:
    """Policies of the latest view. floor: probability that every arm is played with at least."""

    def __init__(self, floor: float) -> None:
        if not 0 < floor < 1:
            raise BanditError(f"the floor is {floor}; it must be above 0 and below 1")
        self._floor = floor
        self._latest: tuple[tuple[int, int, str | None], tuple[NeuralLinearTS, ...]] | None = None

    def of(self, view: View, selector: Selector, novel: bool) -> NeuralLinearTS:
        """By the safe rule of the selector; for pairs unlike its training (novel) only the floor explores."""
        key = (view.seq, view.epoch, view.model_version)
        if self._latest is None or self._latest[0] != key:
            floor = min(self._floor, 1 / num_choices(view.posteriors))
            fixed = selector.best_fixed if selector.best_fixed in view.posteriors else None
            rules = [None if fixed is None else SafeRule(fixed, t) for t in (selector.override.threshold, math.inf)]
            made = (NeuralLinearTS(view.posteriors, noise_of(view), rule, floor) for rule in rules)
            self._latest = (key, tuple(made))
        return self._latest[1][novel]


def pair_decision(
    view: View, contexts: Contexts, policy: NeuralLinearTS, context: PairContext, asked: Asked
) -> tuple[DecisionMade, Decision]:
    """Draw an arm for a pair; the event that says so, and the answer."""
    kept = context.kept
    suggestion = policy.suggest(context.z, asked.decision_id, asked.explore, context.classes, kept=kept)
    propensities = dict(zip(suggestion.arms, suggestion.propensities.tolist(), strict=True))
    best_fixed, tasks = contexts.published.selector.best_fixed, list(context.tasks)
    told: dict[str, Any] = {"kind": "pair", "left": context.left, "right": context.right, "tasks": tasks}
    predictions = _predictions(context, view, policy.noise, propensities)
    answer = Decision(
        **told,
        arm=suggestion.arm,
        plan=_keep_plan(context, suggestion.arm, predictions),
        reason=_reason(context, suggestion, best_fixed, predictions),
        overrode=suggestion.arm != best_fixed,
        propensities=propensities,
        arms=predictions,
        distance=context.answer.choice.distance,
        limit=context.answer.limit,
        **_of_any_decision(view, contexts, asked),
    )
    return _event(answer, told, suggestion.arm, context, _class_of(suggestion.arm, context, view)), answer


def plan_decision(
    view: View, contexts: Contexts, drawn: DrawnPlan, request: DecisionRequest, asked: Asked
) -> tuple[DecisionMade, Decision]:
    """The event of a drawn plan, and the answer.

    One step is learned from like a pair; longer ones are kept for training.
    """
    chosen = drawn.plans[drawn.chosen]
    plan, tasks, probabilities = chosen.plan, list(chosen.by_task), [float(p) for p in drawn.propensities]
    context: PairContext | None = None
    learns: tuple[str, ...] = ()
    if len(plan.steps) == 1 and plan.steps[0].weight == 0.5 and plan.steps[0].arm.label in view.posteriors:
        step = plan.steps[0]
        context = contexts.of(step.left, step.right, request.task)
        learns = _class_of(step.arm.label, context, view)
    ids = [one.plan.id for one in drawn.plans]
    answer = Decision(
        kind="plan",
        tasks=tasks,
        arm=plan.label,
        plan=plan_prediction(chosen, probabilities[drawn.chosen]),
        reason=_plan_reason(drawn, asked.explore),
        overrode={step.arm.label for step in plan.steps} != {contexts.published.selector.best_fixed},
        propensities=dict(zip(ids, probabilities, strict=True)),
        plans=[plan_prediction(one, p) for one, p in zip(drawn.plans, probabilities, strict=True)],
        **_of_any_decision(view, contexts, asked),
    )
    told = {"kind": "plan", "tasks": tasks, "checkpoints": request.checkpoints, "plan": plan.to_json()}
    return _event(answer, told, plan.id, context, learns), answer


def _plan_reason(drawn: DrawnPlan, explores: bool) -> str:
    if drawn.plans[drawn.chosen].unlike:
        return "not trained for such checkpoints: no prediction tells these plans apart"
    return f"drawn among the {len(drawn.plans)} plans that are predicted best" if explores else "predicted best"


def _of_any_decision(view: View, contexts: Contexts, asked: Asked) -> dict[str, Any]:
    """Fields of an answer that do not depend on what is chosen."""
    return {
        "decision_id": asked.decision_id,
        "explored": asked.explore,
        "best_fixed": contexts.published.selector.best_fixed,
        "epoch": view.epoch,
        "seq_seen": view.seq,
        "expires_at": asked.expires_at,
        "model_version": contexts.published.version,
    }


def _event(
    answer: Decision, request: Mapping[str, Any], played: str, context: PairContext | None, learns: tuple[str, ...]
) -> DecisionMade:
    """context: that the reward is learned in; None where it is not."""
    return DecisionMade(
        decision_id=answer.decision_id,
        request=request,
        features=np.zeros(0) if context is None else context.features_of(played),
        z=np.zeros(0) if context is None else context.kept.get(played, context.z),
        level=0.0 if context is None else context.level,
        epoch=answer.epoch,
        arms=tuple(answer.propensities),
        propensities=tuple(answer.propensities.values()),
        arm=played,
        learns=learns,
        explored=answer.explored,
        seq_seen=answer.seq_seen,
        model_version=answer.model_version,
        expires_at=answer.expires_at,
        answer=answer.model_dump(mode="json"),
    )


def ranked(contexts: Contexts, view: View, request: RankRequest) -> Ranked:
    """All arms for a pair, and the choice of the selector's safe policy."""
    context = contexts.of(request.left, request.right, request.task)
    choice = context.answer.choice
    return Ranked(
        left=request.left,
        right=request.right,
        tasks=list(context.tasks),
        arm=choice.arm,
        reason=choice.reason,
        overrode=choice.overrode,
        distance=choice.distance,
        limit=context.answer.limit,
        arms=_predictions(context, view, noise_of(view), {}),
        best_fixed=contexts.published.selector.best_fixed,
        model_version=view.model_version or "",
        why=contexts.why(context),
    )


def start_of(request: ArmRequest, view: View) -> ArmAdded:
    """The event of a new arm.
    Raises OperatorError: no such operator or parameters, or not for two checkpoints. BanditError: an unknown sibling.
    """
    label = KEEP if request.arm == KEEP else _operator(request.arm)
    dimensions = next(iter(view.posteriors.values())).num_dimensions
    nothing = GaussianPosterior.prior(dimensions, cold_ridge(noise_of(view)))
    if request.sibling is None:
        return ArmAdded(label, nothing, view.epoch)
    if KEEP in (label, request.sibling):
        raise BanditError(f"{KEEP!r} keeps a checkpoint as it is: no operator is its sibling")
    if request.sibling not in view.posteriors:
        raise BanditError(unknown_name("arm", request.sibling, view.posteriors))
    known = view.posteriors[request.sibling]
    # Nothing of it stays whole: what a sibling learned from labels is as much an observation as its rewards.
    return ArmAdded(label, known.discounted(request.power, nothing), view.epoch)


def _operator(text: str) -> str:
    """Label of an arm that merges two checkpoints."""
    arm = parse_arm(text)
    if arm.spec.max_sources == 1:
        raise BanditError(f"arm {arm.label!r} takes one checkpoint; an arm merges two")
    return arm.label


def new_epoch_of(contexts: Contexts, view: View) -> EncoderEpoch:
    """The event that puts another selector into force; the whole log is folded again with it."""
    priors, noise = contexts.priors()
    version = contexts.published.version
    return EncoderEpoch(view.epoch + 1, contexts.num_dimensions, cold_ridge(noise), priors, noise, version)


def _class_of(arm: str, context: PairContext, view: View) -> tuple[str, ...]:
    """The arms that make the same merge of a pair as `arm`, which is one of them; `keep` for a kept parent."""
    if arm in context.kept:
        return (KEEP,)
    same = {arm}.union(*(one for one in context.classes if arm in one))
    return tuple(one for one in view.posteriors if one in same)


def _predictions(context: PairContext, view: View, noise: Noise, propensities: dict[str, float]) -> list[ArmPrediction]:
    """From best to worst by what the selector says; arms that it does not know come last."""
    known: dict[str, dict[str, Any]] = {
        # What the selector says of checkpoints unlike those of its training is no prediction.
        one.arm: {} if context.novel else {"utility": one.utility, "sd": one.sd, "interval": one.interval}
        for one in context.answer.ranked
    }
    playable = {arm: (one, context.z) for arm, one in view.posteriors.items() if arm != KEEP}
    if KEEP in view.posteriors:
        playable |= {name: (view.posteriors[KEEP], z) for name, z in context.kept.items()}
    order = [*(arm for arm in known if arm in playable), *(arm for arm in playable if arm not in known)]
    found = []
    for arm in order:
        posterior, z = playable[arm]
        mean, spread = posterior.marginal(z)
        found.append(
            ArmPrediction(
                arm=arm,
                **known.get(arm, {}),
                expected=context.level + mean,
                expected_sd=math.sqrt(noise.variance) * spread,
                propensity=propensities.get(arm),
            )
        )
    return found


def _keep_plan(context: PairContext, arm: str, predictions: list[ArmPrediction]) -> PlanPrediction | None:
    """The plan of a kept parent, as `simmerge merge` reads it; an operator has none."""
    if arm not in context.kept:
        return None
    plan, told = arm_plan(context.left, context.right, arm), next(one for one in predictions if one.arm == arm)
    utility, sd = (told.utility, told.sd) if told.utility is not None else (told.expected, told.expected_sd)
    return PlanPrediction(
        id=plan.id,
        label=arm,
        utility=utility,
        sd=sd,
        interval=told.interval,
        propensity=told.propensity,
        plan=plan.to_json(),
    )


def _reason(context: PairContext, suggestion: Suggestion, best_fixed: str, predictions: Sequence[ArmPrediction]) -> str:
    """Why the arm was played, true of a random draw as well: what is expected of it may be less than of others."""
    played = next(one for one in predictions if one.arm == suggestion.arm)
    how = f"drawn with probability {played.propensity:.2f}" if suggestion.explored else "not explored"
    if context.novel:
        return f"{context.answer.choice.reason}; {how}"
    if suggestion.arm == best_fixed:
        return f"best fixed arm {best_fixed}: no other is good enough to leave it; {how}"
    expected = {one.arm: one.expected or 0.0 for one in predictions}
    advantage = expected[suggestion.arm] - expected.get(best_fixed, 0.0)
    if best_fixed not in expected:
        return f"the best fixed arm {best_fixed} is not played here; {how}"
    if advantage > 0:
        return f"expected {advantage:+.3f} over the best fixed arm {best_fixed} by what is known so far; {how}"
    return f"a try: expected {advantage:+.3f} beside the best fixed arm {best_fixed}, and drawn to learn more; {how}"
