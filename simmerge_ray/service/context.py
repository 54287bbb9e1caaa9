"""From a request to an event: contexts of pairs by one published selector, and the policy that draws among the arms."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.errors import BanditError, SelectorError, unknown_name
from simmerge_ray.plans.operators.specs import parse_arm
from simmerge_ray.selector.data.dataset import pair_features
from simmerge_ray.selector.models.influence import influences
from simmerge_ray.selector.models.model import Selector
from simmerge_ray.selector.planning.recommender import Recommendation, Recommender
from simmerge_ray.service.bandit.policy import NeuralLinearTS, Noise, SafeRule, Suggestion
from simmerge_ray.service.bandit.posterior import GaussianPosterior
from simmerge_ray.service.bandit.warm_start import COLD_NOISE, cold_prior, cold_ridge, contexts_of, sibling_prior
from simmerge_ray.service.log.events import ArmAdded, DecisionMade, EncoderEpoch, WarmStart
from simmerge_ray.service.log.fold import View
from simmerge_ray.service.planning import DrawnPlan, plan_prediction
from simmerge_ray.service.registry import Published
from simmerge_ray.service.schemas import (
    ArmPrediction,
    ArmRequest,
    Decision,
    Influence,
    Ranked,
    RankRequest,
)
from simmerge_ray.signals.table import SignalTable

Array = np.ndarray
_KEPT_CONTEXTS = 20_000
_MAX_AVERAGED = 200  # pairs that the average pair is taken of


@dataclass(frozen=True, eq=False)
class PairContext:
    """A pair on its tasks together.

    features: raw (T, 2, F). z (d,), level: mean over the tasks. answer: of the selector alone. classes: of arms that
    make the same merge of it.
    """

    left: str
    right: str
    tasks: tuple[str, ...]
    features: Array
    z: Array
    level: float
    answer: Recommendation
    classes: tuple[tuple[str, ...], ...]

    @property
    def novel(self) -> bool:
        """Whether the selector was not trained for such checkpoints."""
        return self.answer.choice.distance > self.answer.limit


class Contexts:
    """Pairs of a table as one selector sees them; the same request is computed once.

    Raises:
        BanditError: a selector without an encoder. SelectorError: one with a task encoding; the log has features alone,
            and a new epoch could not encode them again.
    """

    def __init__(self, published: Published, table: SignalTable) -> None:
        selector = published.selector
        if (kind := selector.fitted.encoding.kind) != "none":
            raise SelectorError(f"the service needs a selector with the task encoding none, this one has {kind}")
        self._published, self._table = published, table
        self._recommender = Recommender(selector, table)
        self._known: OrderedDict[tuple[str, str, str | None], PairContext] = OrderedDict()
        self._averages: dict[str, Array] = {}
        self.best_fixed = selector.best_fixed
        z, _ = self.encode(np.zeros((1, 2, len(selector.columns))))
        self.num_dimensions = len(z)

    def encode(self, features: Array) -> tuple[Array, float]:
        """Raw features (T, 2, F) of a decision -> z (d,) and level, means over the tasks."""
        z, level = contexts_of(self._published.selector.fitted, features, None)
        return z.mean(0), float(level.mean())

    def of(self, left: str, right: str, task: str | None) -> PairContext:
        """Raises PlanError: an unknown checkpoint or task, or twice the same checkpoint."""
        key = (left, right, task)
        if (found := self._known.get(key)) is not None:
            return found
        tasks = (task,) if task is not None else self._table.pair_tasks(left, right)
        features = np.array([pair_features(self._table, left, right, one) for one in tasks])
        features = features.reshape(len(tasks), 2, len(self._published.selector.columns))
        z, level = self.encode(features)
        answer = self._recommender.recommend(left, right, tasks)
        identical = self._published.warm.identical if self._published.warm else {}
        first, second = sorted((left, right))
        found = PairContext(left, right, tasks, features, z, level, answer, identical.get((first, second), ()))
        self._known[key] = found
        while len(self._known) > _KEPT_CONTEXTS:
            self._known.popitem(last=False)
        return found

    def warm_start(self) -> WarmStart:
        """What the arms start from: posteriors from the labels, or priors that know nothing."""
        return WarmStart(*_priors(self._published, self.num_dimensions))

    def why(self, context: PairContext) -> list[Influence]:
        """Groups of signals, and how far each moves the prediction of the chosen arm from that of the average pair."""
        selector = self._published.selector
        arm = selector.arms.index(context.answer.choice.arm)
        average = np.array([self._average(task) for task in context.tasks])

        def predict(features: np.ndarray) -> np.ndarray:
            utility, _ = selector.predict(features, list(context.tasks) * (len(features) // len(context.tasks)))
            return utility[:, arm].reshape(-1, len(context.tasks)).mean(1)

        found = influences(predict, context.features, average, selector.columns)
        return [Influence(signal=name, effect=effect) for name, effect in found]

    def _average(self, task: str) -> Array:
        """(2, F): of pairs of the table, evenly spread."""
        if task not in self._averages:
            ids = self._table.checkpoint_ids
            pairs = [(a, b) for a in ids for b in ids if a < b]
            some = pairs[:: max(1, len(pairs) // _MAX_AVERAGED)]
            self._averages[task] = np.mean([pair_features(self._table, a, b, task) for a, b in some], axis=0)
        return self._averages[task]

    def plan_decision(
        self,
        drawn: DrawnPlan,
        view: View,
        asked_tasks: Sequence[str],
        decision_id: str,
        explore: bool,
        expires_at: float | None,
        checkpoints: Sequence[str],
    ) -> tuple[DecisionMade, Decision]:
        """The event of a drawn plan, and the answer.

        One step is learned from like a pair; longer ones are kept for training.
        """
        chosen, best_fixed = drawn.plans[drawn.chosen], self._published.selector.best_fixed
        plan, probabilities = chosen.plan, [float(p) for p in drawn.propensities]
        tasks = list(chosen.by_task)
        features, z, level = np.zeros(0), np.zeros(0), 0.0
        learns: tuple[str, ...] = ()
        if len(plan.steps) == 1 and plan.steps[0].weight == 0.5 and plan.steps[0].arm.label in view.posteriors:
            step = plan.steps[0]
            context = self.of(step.left, step.right, asked_tasks[0] if asked_tasks else None)
            features, z, level = context.features, context.z, context.level
            learns = _class_of(step.arm.label, context, view)
        ids = [one.plan.id for one in drawn.plans]
        answer = Decision(
            decision_id=decision_id,
            kind="plan",
            tasks=tasks,
            arm=plan.label,
            plan=plan_prediction(chosen, probabilities[drawn.chosen]),
            explored=explore,
            reason=f"drawn among the {len(ids)} plans that are predicted best" if explore else "predicted best",
            overrode={step.arm.label for step in plan.steps} != {best_fixed},
            propensities=dict(zip(ids, probabilities, strict=True)),
            plans=[plan_prediction(one, p) for one, p in zip(drawn.plans, probabilities, strict=True)],
            best_fixed=best_fixed,
            epoch=view.epoch,
            seq_seen=view.seq,
            expires_at=expires_at,
            model_version=self._published.version,
        )
        event = DecisionMade(
            decision_id=decision_id,
            request={"kind": "plan", "tasks": tasks, "checkpoints": list(checkpoints), "plan": plan.to_json()},
            features=features,
            z=z,
            level=level,
            epoch=view.epoch,
            arms=tuple(ids),
            propensities=tuple(probabilities),
            arm=plan.id,
            learns=learns,
            explored=explore,
            seq_seen=view.seq,
            model_version=self._published.version,
            expires_at=expires_at,
            answer=answer.model_dump(mode="json"),
        )
        return event, answer


@dataclass(frozen=True)
class Policies:
    """usual: by the safe rule of the selector. novel: for pairs unlike its training, where only the floor explores."""

    usual: NeuralLinearTS
    novel: NeuralLinearTS


class PolicyCache:
    """Policies of the latest view. floor: probability that every arm is played with at least."""

    def __init__(self, floor: float) -> None:
        if not 0 < floor < 1:
            raise BanditError(f"the floor is {floor}; it must be above 0 and below 1")
        self._floor = floor
        self._latest: tuple[tuple[int, str | None], Policies] | None = None

    @staticmethod
    def noise(view: View) -> Noise:
        """Of the rewards."""
        return view.noise or COLD_NOISE

    def of(self, view: View, selector: Selector) -> Policies:
        """Kept until the log goes on."""
        key = (view.seq, view.model_version)
        if self._latest is None or self._latest[0] != key:
            floor = min(self._floor, 1 / len(view.posteriors))
            fixed = selector.best_fixed if selector.best_fixed in view.posteriors else None
            rules = [None if fixed is None else SafeRule(fixed, t) for t in (selector.override.threshold, math.inf)]
            usual, novel = (
                NeuralLinearTS(view.posteriors, self.noise(view), rule, floor, view.priors) for rule in rules
            )
            self._latest = (key, Policies(usual, novel))
        return self._latest[1]


def decide_pair(
    view: View,
    published: Published,
    policies: Policies,
    context: PairContext,
    decision_id: str,
    explore: bool,
    expires_at: float | None,
) -> tuple[DecisionMade, Decision]:
    """Draw an arm for a pair; the event that says so, and the answer."""
    policy = policies.novel if context.novel else policies.usual
    suggestion = policy.suggest(context.z, decision_id, explore, context.classes)
    propensities = dict(zip(suggestion.arms, suggestion.propensities.tolist(), strict=True))
    best_fixed = published.selector.best_fixed
    answer = Decision(
        decision_id=decision_id,
        kind="pair",
        left=context.left,
        right=context.right,
        tasks=list(context.tasks),
        arm=suggestion.arm,
        explored=explore,
        reason=_reason(context, suggestion, best_fixed, propensities),
        overrode=suggestion.arm != best_fixed,
        propensities=propensities,
        arms=_predictions(context, view, policy.noise, propensities),
        best_fixed=best_fixed,
        distance=context.answer.choice.distance,
        limit=context.answer.limit,
        epoch=view.epoch,
        seq_seen=view.seq,
        expires_at=expires_at,
        model_version=published.version,
    )
    event = DecisionMade(
        decision_id=decision_id,
        request={"kind": "pair", "left": context.left, "right": context.right, "tasks": list(context.tasks)},
        features=context.features,
        z=context.z,
        level=context.level,
        epoch=view.epoch,
        arms=suggestion.arms,
        propensities=tuple(propensities.values()),
        arm=suggestion.arm,
        learns=_class_of(suggestion.arm, context, view),
        explored=explore,
        seq_seen=view.seq,
        model_version=published.version,
        expires_at=expires_at,
        answer=answer.model_dump(mode="json"),
    )
    return event, answer


def ranked(contexts: Contexts, view: View, noise: Noise, request: RankRequest) -> Ranked:
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
        arms=_predictions(context, view, noise, {}),
        best_fixed=contexts.best_fixed,
        model_version=view.model_version or "",
        why=contexts.why(context),
    )


def start_of(request: ArmRequest, view: View) -> ArmAdded:
    """The event of a new arm.

    Raises:
        OperatorError: no such operator or parameters, or not for two checkpoints. BanditError: an unknown sibling.
    """
    arm = parse_arm(request.arm)
    if arm.spec.max_sources == 1:
        raise BanditError(f"arm {arm.label!r} takes one checkpoint; an arm merges two")
    dimensions = next(iter(view.posteriors.values())).num_dimensions
    nothing = cold_prior(dimensions, view.noise or COLD_NOISE)
    if request.sibling is None:
        return ArmAdded(arm.label, nothing, view.epoch)
    if request.sibling not in view.posteriors:
        raise BanditError(unknown_name("arm", request.sibling, view.posteriors))
    known = view.posteriors[request.sibling]
    # Nothing of it stays whole: what a sibling learned from labels is as much an observation as its rewards.
    return ArmAdded(arm.label, sibling_prior(known, nothing, request.power), view.epoch)


def new_epoch_of(published: Published, num_dimensions: int, view: View) -> EncoderEpoch:
    """The event that puts another selector into force; the whole log is folded again with it."""
    priors, noise = _priors(published, num_dimensions)
    return EncoderEpoch(view.epoch + 1, num_dimensions, cold_ridge(noise), priors, noise, published.version)


def _priors(published: Published, num_dimensions: int) -> tuple[dict[str, GaussianPosterior], Noise]:
    """What the arms of a selector start from: posteriors from the labels, or cold priors; and the noise."""
    if (warm := published.warm) is not None:
        return dict(warm.posteriors), warm.noise
    return dict.fromkeys(published.selector.arms, cold_prior(num_dimensions, COLD_NOISE)), COLD_NOISE


def _class_of(arm: str, context: PairContext, view: View) -> tuple[str, ...]:
    """The arms that make the same merge of a pair as `arm`, which is one of them."""
    same = {arm}.union(*(one for one in context.classes if arm in one))
    return tuple(one for one in view.posteriors if one in same)


def _predictions(context: PairContext, view: View, noise: Noise, propensities: dict[str, float]) -> list[ArmPrediction]:
    """From best to worst by what the selector says; arms that it does not know come last."""
    known = {one.arm: one for one in context.answer.ranked}
    order = [*(arm for arm in known if arm in view.posteriors), *(arm for arm in view.posteriors if arm not in known)]
    found = []
    for arm in order:
        mean, spread = view.posteriors[arm].marginal(context.z)
        one = known.get(arm)
        found.append(
            ArmPrediction(
                arm=arm,
                utility=one.utility if one else None,
                sd=one.sd if one else None,
                interval=one.interval if one else None,
                expected=context.level + mean,
                expected_sd=math.sqrt(noise.variance) * spread,
                propensity=propensities.get(arm),
            )
        )
    return found


def _reason(context: PairContext, suggestion: Suggestion, best_fixed: str, propensities: dict[str, float]) -> str:
    how = f"drawn with probability {propensities[suggestion.arm]:.2f}" if suggestion.explored else "not explored"
    if context.novel:
        return f"{context.answer.choice.reason}; {how}"
    if suggestion.arm == best_fixed:
        return f"best fixed arm {best_fixed}: no other is good enough to leave it; {how}"
    return f"better than the best fixed arm {best_fixed} by what is known so far; {how}"
