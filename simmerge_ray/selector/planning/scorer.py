"""The plan scorer: ranks merges of several checkpoints that nobody has made.

Two stages. `second_order` features, which cost next to nothing, make a shortlist of all plans, or of a beam of them
(see `search`); a better propagator, `virtual` by default, computes the features of the shortlist's steps anew and
ranks it. Each stage has a selector of its own, trained with exactly the features that its propagator delivers.

A plan's score is the predicted utility of its last step, whose left side is the merge of all earlier ones (`last`), or
the `mean` or `sum` over its steps. Plans are ranked by the score minus `caution` times the spread of the ensemble, with
predictions clipped to [0, 1]: otherwise the best of many thousand predictions is the one that extrapolates most. In the
demo, where only checkpoints of different tasks were merged for training, pairs of one task are predicted to reach 1.1
(median) with a spread of 0.6, pairs like those of the training 0.8 with 0.05.

Selectors are trained on merges of two checkpoints with weight 1/2 each. Predictions for a step with another weight, or
for more checkpoints, are extrapolated, and `RankedPlan.approximate` says so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from simmerge_ray.base.config import RankingConfig
from simmerge_ray.base.errors import SelectorError
from simmerge_ray.plans.operators.specs import parse_arm
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.selector.models.influence import influences
from simmerge_ray.selector.planning.search import AGGREGATES, Model, PlanSearch, aggregated, best_first
from simmerge_ray.selector.planning.space import PlanSpace, scorable_arms
from simmerge_ray.selector.planning.tasks import TaskPool
from simmerge_ray.signals.features import both_orders
from simmerge_ray.signals.propagation.batch import SecondOrderBatch
from simmerge_ray.signals.propagation.interface import PlanStep, Propagator, Source, fold_path, plan_sources
from simmerge_ray.signals.propagation.second_order import blend_like
from simmerge_ray.signals.table import SignalTable

_DEFAULTS = RankingConfig()
_Z95 = 1.96
_NUM_REPORTS = 20  # of progress, while features of steps are computed
_LEAST_STEPS = 8  # at a time


@dataclass(frozen=True)
class RankedPlan:
    """A plan and its prediction.

    utility, sd: pooled over the tasks. score: what it is ranked by. by_task: (utility, sd) for each task that counts.
    why: groups of signals and how far each moves the prediction from the average plan's (see `influences`).
    propagator: the one that computed the features. approximate: what features and prediction rest on beyond measured
    signals. label_error: standard error of the labels of the training. unlike: its checkpoints are unlike those of the
    training, so the prediction says nothing and nobody is shown it.
    """

    plan: MergePlan
    utility: float
    sd: float
    score: float
    by_task: Mapping[str, tuple[float, float]]
    propagator: str
    approximate: tuple[str, ...] = ()
    why: tuple[tuple[str, float], ...] = ()
    label_error: float = 0.0
    unlike: bool = False

    @property
    def predicted(self) -> dict[str, dict[str, float]]:
        """By task, as plan files and model cards have it; nothing where it would say nothing."""
        if self.unlike:
            return {}
        return {task: {"utility": utility, "sd": sd} for task, (utility, sd) in self.by_task.items()}

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the spread of the ensemble and of the labels' own errors, within [0, 1]: how far its members disagree
        on what a measurement will say, not how far they err."""
        half = _Z95 * math.hypot(self.sd, self.label_error)
        return max(0.0, self.utility - half), min(1.0, self.utility + half)


@dataclass(frozen=True)
class Ranking:
    """plans: from best to worst. best_fixed: the first plan's checkpoints, in its order, by the best fixed arm alone.
    num_scored: plans of the first stage. width: of its beam; None where it was exhaustive. num_reranked: of the second.
    """

    plans: tuple[RankedPlan, ...]
    best_fixed: RankedPlan
    num_scored: int
    width: int | None
    num_reranked: int

    def with_best_fixed(self) -> Ranking:
        """For merges to be measured: `best_fixed` takes the last place, unless it is ranked or there is only one.

        In the study the first prediction was hardly better than the best fixed arm, so it is measured as well.
        """
        kept = self.plans[:-1]
        if not kept or any(one.plan.id == self.best_fixed.plan.id for one in self.plans):
            return self
        return replace(self, plans=(*kept, self.best_fixed))


@dataclass(frozen=True)
class _Steps:
    """Features of steps. place: row by (left, right, task). inputs: (N, 2, F). tasks: of the rows."""

    place: Mapping[tuple[Source, Source, str], int]
    inputs: np.ndarray
    tasks: np.ndarray


class PlanScorer:
    """Scores plans over the checkpoints of a signal table. selector: knows columns that `propagator` delivers.
    shortlist: the same for `second_order`, needed by `rank`. Raises SelectorError: a selector with columns that its
    propagator does not deliver."""

    def __init__(
        self,
        table: SignalTable,
        propagator: Propagator,
        selector: Model,
        shortlist: Model | None = None,
        num_threads: int | None = None,
    ) -> None:
        self._table, self._propagator, self._selector, self._shortlist = table, propagator, selector, shortlist
        self._num_threads = num_threads or min(4, os.cpu_count() or 1)
        self._batch = SecondOrderBatch(table)
        check_columns(selector, propagator.name, propagator.columns)
        if shortlist is not None:
            check_columns(shortlist, "second_order", self._batch.columns)
            if shortlist.arms != selector.arms:
                raise SelectorError("the selector and its shortlist know different arms; run `simmerge train` again")

    def rank(
        self,
        space: PlanSpace,
        pool: TaskPool,
        top: int = 10,
        config: RankingConfig = _DEFAULTS,
        are_unlike: Callable[[Sequence[tuple[str, str]]], Sequence[bool] | np.ndarray] = lambda pairs: (
            [False] * len(pairs)
        ),
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> Ranking:
        """The best plans of a space: all are scored if that fits the budget, else a beam of about so many.

        Args:
            config: budget, shortlist, aggregate and caution count; the space and the pool were made from the others.
            are_unlike: which pairs of checkpoints the selector does not know; plans with one come after all others.
            report: called with (done, total) plans of the shortlist, which take most of the time.

        Raises:
            SelectorError: no shortlist selector, or an arm it does not know.
        """
        if self._shortlist is None:
            raise SelectorError("ranking needs the selector of the shortlist, too; `simmerge train` writes both")
        aggregate, caution = config.aggregate, config.caution
        scorable_arms([arm.label for arm in space.arms], self._shortlist.arms, self._with_base)
        search = PlanSearch(self._batch, self._shortlist, space, pool, aggregate, caution, self._num_threads)
        found = search.run(space.beam_width(config.budget), max(config.shortlist, top))
        steps = self._steps(found.plans, pool, aggregate, report)
        pairs = sorted({pair for plan in found.plans for pair in combinations(sorted(plan.members), 2)})
        far = {pair for pair, is_far in zip(pairs, are_unlike(pairs), strict=True) if is_far}

        def told(one: RankedPlan) -> RankedPlan:
            return replace(one, unlike=any(pair in far for pair in combinations(sorted(one.plan.members), 2)))

        scored = [told(one) for one in self._scored(found.plans, pool, steps, aggregate, caution)]
        order = sorted(best_first(np.array([one.score for one in scored])), key=lambda place: scored[place].unlike)
        plans = [replace(scored[i], why=self._why(scored[i].plan, pool, steps)) for i in order[:top]]
        fixed = with_arm(plans[0].plan, self._selector.best_fixed)
        best_fixed = told(self.score([fixed], pool, config)[0])
        return Ranking(tuple(plans), best_fixed, found.num_scored, found.width, len(scored))

    def score(self, plans: Sequence[MergePlan], pool: TaskPool, config: RankingConfig = _DEFAULTS) -> list[RankedPlan]:
        """Predictions for given plans, in their order, folds or not; raises as `score_by_aggregate`."""
        return self.score_by_aggregate(plans, pool, (config.aggregate,), config.caution)[config.aggregate]

    def score_by_aggregate(
        self,
        plans: Sequence[MergePlan],
        pool: TaskPool,
        aggregates: Sequence[str] = AGGREGATES,
        caution: float = _DEFAULTS.caution,
    ) -> dict[str, list[RankedPlan]]:
        """`score` for several aggregates; the features of a step, which are most of the work, are computed once. Raises
        SelectorError: an arm that the selector does not know. PlanError, OperatorError: see `Propagator.steps` (a
        weight that changes with depth among them)."""
        for plan in plans:
            labels = sorted({step.arm.label for step in plan.steps}) or ["passthrough"]
            scorable_arms(labels, self._selector.arms, self._with_base)
        # Any aggregate but `last` needs all steps.
        widest = next((aggregate for aggregate in aggregates if aggregate != "last"), "last")
        steps = self._steps(plans, pool, widest)
        return {aggregate: self._scored(plans, pool, steps, aggregate, caution) for aggregate in aggregates}

    def _why(self, plan: MergePlan, pool: TaskPool, steps: _Steps) -> tuple[tuple[str, float], ...]:
        """`influences` on the prediction of the last step, against the average of all steps on the same tasks."""
        arm, tasks = self._selector.arms.index(plan.steps[-1].arm.label), self._plan_tasks(plan, pool)
        left, right = plan_sources(plan)[-1]
        rows = [steps.place[left, right, pool.tasks[task]] for task in tasks]
        average = np.array([steps.inputs[steps.tasks == task].mean(0) for task in tasks])

        def predict(inputs: np.ndarray) -> np.ndarray:
            utility = self._selector.predict(inputs)[0][:, arm].reshape(-1, len(tasks))
            by_task = np.zeros((len(utility), len(pool.tasks)))
            by_task[:, tasks] = utility
            return pool.pooled(by_task, np.zeros_like(by_task), np.isin(np.arange(len(pool.tasks)), tasks))[0]

        return influences(predict, steps.inputs[rows], average, self._selector.columns)

    @property
    def _with_base(self) -> bool:
        return self._table.provenance.get("base") is not None

    def _plan_tasks(self, plan: MergePlan, pool: TaskPool) -> list[int]:
        """Places in `pool.tasks` of those that count for a plan."""
        members = np.array([self._batch.ids.index(member) for member in plan.members])
        return np.flatnonzero(pool.counted(members)).tolist()

    def _steps(
        self,
        plans: Sequence[MergePlan],
        pool: TaskPool,
        aggregate: str,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> _Steps:
        """Features of the steps that count, each computed once however many plans share it."""
        wanted: dict[tuple[Source, Source, str], PlanStep] = {}
        for plan in plans:
            tasks = [pool.tasks[task] for task in self._plan_tasks(plan, pool)]
            for number, sources in _counting(plan, aggregate):
                for task in tasks:
                    wanted.setdefault((*sources, task), PlanStep(plan, number, task))
        every, values, done = list(wanted.values()), np.empty((len(self._selector.columns), len(wanted))), 0
        propagator = self._propagator.among({member for plan in plans for member in plan.members})
        report(0, len(every))
        for rows in _parts(list(wanted), max(_LEAST_STEPS, len(every) // _NUM_REPORTS)):
            some = [every[row] for row in rows]
            values[:, rows] = propagator.batch(some, self._selector.columns, self._num_threads)
            done += len(rows)
            report(done, len(every))
        place = {key: row for row, key in enumerate(wanted)}
        of_rows = np.array([pool.tasks.index(task) for *_, task in wanted])
        return _Steps(place, both_orders(values, self._selector.columns), of_rows)

    def _scored(
        self, plans: Sequence[MergePlan], pool: TaskPool, steps: _Steps, aggregate: str, caution: float
    ) -> list[RankedPlan]:
        utility, sd = self._selector.predict(steps.inputs)
        utility, name, ranked = utility.clip(0.0, 1.0), self._propagator.name, []
        for plan in plans:
            tasks, total = self._plan_tasks(plan, pool), np.zeros((2, len(pool.tasks)))
            for number, sources in _counting(plan, aggregate):
                arm = self._selector.arms.index(plan.steps[number].arm.label)
                rows = [steps.place[(*sources, pool.tasks[task])] for task in tasks]
                total[:, tasks] += utility[rows, arm], sd[rows, arm]
            mean, spread = aggregated(total, len(plan.steps), aggregate)
            counted = np.isin(np.arange(len(pool.tasks)), tasks)
            pooled, pooled_sd = map(float, pool.pooled(mean, spread, counted))
            by_task = {pool.tasks[task]: (float(mean[task]), float(spread[task])) for task in tasks}
            score, notes = pooled - caution * pooled_sd, approximations(plan, name)
            error = self._selector.label_error
            ranked.append(RankedPlan(plan, pooled, pooled_sd, score, by_task, name, notes, label_error=error))
        return ranked


def _parts(steps: Sequence[tuple[Source, Source, str]], size: int) -> list[list[int]]:
    """Places of steps in parts of about `size`; those with the same left side, which they share, are in one part."""
    of_left: dict[Source, list[int]] = {}
    for place in sorted(range(len(steps)), key=lambda one: fold_path(steps[one][0])):
        of_left.setdefault(steps[place][0], []).append(place)
    parts: list[list[int]] = []
    for places in of_left.values():
        if not parts or len(parts[-1]) >= size:
            parts.append([])
        parts[-1] += places
    return parts


def _counting(plan: MergePlan, aggregate: str) -> list[tuple[int, tuple[Source, Source]]]:
    """The steps that count, numbered, by their two sides."""
    return list(enumerate(plan_sources(plan)))[-1 if aggregate == "last" else 0 :]


def check_columns(selector: Model, propagator: str, columns: Sequence[str]) -> None:
    """Refuse a selector that was trained with features that a propagator does not deliver. Raises SelectorError: naming
    one of them, and what to do."""
    if missing := sorted(set(selector.columns) - set(columns)):
        raise SelectorError(
            f"propagator {propagator!r} does not deliver {len(missing)} of the features that the selector was trained "
            f"with, e.g. {missing[0]!r}; take propagator 'virtual', a selector of these features (`simmerge train` "
            "writes one for 'second_order'), or compute the signals as for training (with or without a base)"
        )


def with_arm(plan: MergePlan, arm: str) -> MergePlan:
    """The same plan by one arm in every step."""
    steps = [replace(step, arm=parse_arm(arm)) for step in plan.steps]
    return replace(plan, steps=(steps[0].canonical(), *steps[1:]))


def approximations(plan: MergePlan, propagator: str) -> tuple[str, ...]:
    """What a plan's score rests on beyond measured signals and merges like those of the training."""
    notes = []
    inner = [step.arm for step in plan.steps[:-1]]
    if inner and propagator != "exact":
        outputs = "bounds" if propagator == "bound" else "mixtures of the checkpoints'"
        notes.append(f"outputs of intermediates are {outputs}")
        if propagator in ("bound", "second_order"):
            notes.append("entropy and loss of intermediates are weighted means")
        if propagator == "second_order":
            notes += [f"{arm.label} counts as {blend_like(arm).label}" for arm in inner if blend_like(arm) != arm]
    if any(step.weight != 0.5 for step in plan.steps):
        notes.append("the selector was trained on weights of 1/2")
    if len(plan.steps) > 1:
        notes.append("the selector was trained on pairs")
    return tuple(dict.fromkeys(notes))
