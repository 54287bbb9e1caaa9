"""What is measured next: every missing trial in order, or what Optuna proposes from the results so far."""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping, Sequence
from functools import partial
from typing import Any

from simmerge_ray.base.errors import ConfigError, unknown_name
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.search.labels import Infeasible, LabeledPlan, Stopped
from simmerge_ray.search.runner import TrialProgress
from simmerge_ray.search.setup import GivenPlans, PreparedSearch, Trial, grid_trials
from simmerge_ray.search.space import STEP, Parameters, Range

SAMPLERS = ("tpe", "cmaes", "random")
# Optuna warm-starts CMA-ES from the best tenth of these trials: around one place with a standard deviation of 0.1 of
# every range, where it takes 1/6 else. (Its `x0` and `sigma0` are to be removed.)
_NUM_WARM = 10
_MAX_REPEATS = 200  # proposals in a row that were made before, after which the space counts as exhausted


class Proposer:
    """Hands out the given trials, in order. `number` is the caller's name of a trial.

    total: how many trials it will hand out.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._trials = list(trials)
        self.total = len(self._trials)

    def propose(self, number: str) -> Trial | None:
        """The next trial; None when there are no more."""
        return self._trials.pop(0) if self._trials else None

    def report(self, number: str, step: int, utilities: Mapping[str, float]) -> None:
        """Utilities of what was evaluated of a trial after `step` shards. Nothing follows: the order is fixed."""

    def finish(self, number: str, progress: TrialProgress | None) -> None:
        """A trial ended; None when it failed or was given up."""


class OptunaProposer(Proposer):
    """First the given trials, then what Optuna's sampler proposes, until `budget` merges have labels.

    Labels that are in the store count: they are told to Optuna first, so that a search goes on where it stopped. A
    repeated proposal gets its known value and costs nothing, and so does one that is a checkpoint as it is.

    Args:
        first: trials to run before any proposal; those of merges count as proposals do.
        start: plans to search from. Those of the space are told to Optuna when they are measured, and the search by
            CMA-ES starts around the first of them; the others only count.
    """

    def __init__(self, search: PreparedSearch, first: Sequence[Trial], start: Sequence[MergePlan] = ()) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        assert search.space is not None and search.config.budget is not None
        self._states = optuna.trial.TrialState
        self._search, self._space = search, search.space
        places = [found for plan in start if (found := self._space.parameters(plan)) is not None]
        self._optuna = optuna.create_study(
            directions=["maximize"] * len(search.objectives),
            sampler=make_sampler(search.config.sampler, search.config.seed, places[0] if places else None),
        )
        self._running: dict[str, tuple[Any, MergePlan]] = {}
        self._known: dict[str, list[float] | None] = {}
        given, counted = {plan.id for plan in start}, set()
        for plan, labels in search.labels().items():
            if set(labels) == set(search.tasks_of(plan)):
                is_told = self._tell_labels(plan, labels)
                if plan.is_merge and (is_told or plan.id in given):
                    counted.add(plan.id)
        self._num_left = max(0, search.config.budget - len(counted))
        super().__init__(self._affordable(first, counted))
        self.total += self._num_left

    def _affordable(self, first: Sequence[Trial], counted: Container[str]) -> list[Trial]:
        """The trials that the budget allows, which is less for them."""
        kept = []
        for trial in first:
            costs = trial.plan.is_merge and trial.plan.id not in counted
            if not costs or self._num_left:
                kept.append(trial)
                self._num_left -= costs
        return kept

    def propose(self, number: str) -> Trial | None:
        if self._trials:
            given = self._trials.pop(0)
            self._running[number] = (None, given.plan)
            self._known.setdefault(given.plan.id, None)
            return given
        for _ in range(_MAX_REPEATS if self._num_left else 0):
            trial = self._optuna.ask()
            plan = self._space.plan(partial(_suggest, trial))
            if plan is not None and plan.is_merge and plan.id not in self._known:
                self._known[plan.id] = None
                self._running[number] = (trial, plan)
                self._num_left -= 1
                return Trial(plan, self._search.asked_of(plan), num_shards=self._search.config.num_shards)
            values = self._known.get(plan.id) if plan is not None else None
            self._optuna.tell(trial, values, state=self._states.COMPLETE if values else self._states.FAIL)
        self.total, self._num_left = self.total - self._num_left, 0  # nothing new is left
        return None

    def report(self, number: str, step: int, utilities: Mapping[str, float]) -> None:
        trial, _ = self._running.get(number, (None, None))
        if trial is not None and len(self._search.objectives) == 1:
            trial.report(self._search.values(utilities)[0], step)

    def finish(self, number: str, progress: TrialProgress | None) -> None:
        if number not in self._running:
            return
        trial, plan = self._running.pop(number)
        state, values = self._states.FAIL, None
        if progress is not None and progress.infeasible is None and progress.items:
            state = self._states.COMPLETE if progress.finished else self._states.PRUNED
        if progress is not None and state == self._states.COMPLETE:
            values = self._known[plan.id] = list(self._search.values(progress.utilities))
        if trial is not None:
            self._optuna.tell(trial, values, state=state)
        elif values is not None:
            self._add(plan, state, values)

    def _tell_labels(self, plan: MergePlan, labels: Mapping[str, LabeledPlan]) -> bool:
        """Add a finished trial to Optuna's from all labels of a plan; False if it is not in the space."""
        outcomes = {task: label.outcome for task, label in labels.items()}
        utilities = {task: one.utility for task, one in outcomes.items() if not isinstance(one, Infeasible)}
        state, values, reported = self._states.FAIL, None, {}
        if len(utilities) == len(outcomes):
            values = list(self._search.values(utilities))
            state = self._states.COMPLETE
            if any(isinstance(one, Stopped) for one in outcomes.values()):
                if len(values) > 1:
                    return False  # stopped by a search with one objective; this one does not stop trials
                state, reported, values = self._states.PRUNED, {1: values[0]}, None
        self._known[plan.id] = values
        return self._add(plan, state, values, reported)

    def _add(
        self, plan: MergePlan, state: Any, values: list[float] | None, reported: Mapping[int, float] | None = None
    ) -> bool:
        """Add a trial that Optuna did not ask for; False if it is not in the space."""
        found = self._space.parameters(plan)
        if found is None:
            return False
        nearest = self._space.plan(lambda name, where: found[name][0])
        if nearest is not None:
            self._known.setdefault(nearest.id, values)
        self._optuna.add_trial(_finished(found, values, state, reported))
        return True


def make_proposer(study: PreparedSearch, plans: GivenPlans | None = None, start: Sequence[MergePlan] = ()) -> Proposer:
    """All missing trials in order; with a budget, unmerged checkpoints first, then the plans to start from, then
    Optuna's proposals."""
    if study.space is None or plans is not None:
        return Proposer(grid_trials(study, plans))
    singles = dict.fromkeys(member for subset in study.space.subsets for member in subset)
    names = [*([study.catalogue.base.id] if study.catalogue.base else []), *singles]
    unmerged = [MergePlan(source=name) for name in dict.fromkeys(names)]
    trials = grid_trials(study, list({plan.id: plan for plan in [*unmerged, *start]}.values()))
    trials.sort(key=lambda trial: trial.plan.is_merge)
    return OptunaProposer(study, trials, start)


def make_sampler(name: str, seed: int, near: Parameters | None = None) -> Any:
    """Optuna's sampler of that name: `tpe` (multivariate), `cmaes`, or `random`. near: around which `cmaes` starts,
    instead of all over the space. Raises ConfigError: unknown."""
    import optuna

    if name not in SAMPLERS:
        raise ConfigError(unknown_name("sampler", name, SAMPLERS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            # Several trials run at once: the liar keeps their proposals apart.
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        if name == "cmaes":
            warm = [_finished(near, [0.0])] * _NUM_WARM if near is not None else None
            return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False, source_trials=warm)
        return optuna.samplers.RandomSampler(seed=seed)


def _suggest(trial: Any, name: str, where: Range) -> Any:
    if where.choices:
        return trial.suggest_categorical(name, where.choices)
    return trial.suggest_float(name, where.low, where.high, step=STEP)


def _finished(
    found: Parameters,
    values: Sequence[float] | None,
    state: Any = None,
    reported: Mapping[int, float] | None = None,
) -> Any:
    """A trial as if Optuna had asked for it; without a state it is complete."""
    from optuna.trial import TrialState, create_trial

    return create_trial(
        state=TrialState.COMPLETE if state is None else state,
        values=values,
        params={name: value for name, (value, _) in found.items()},
        distributions={name: _distribution(where) for name, (_, where) in found.items()},
        intermediate_values=dict(reported or {}),
    )


def _distribution(where: Range) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if where.choices:
        return CategoricalDistribution(where.choices)
    return FloatDistribution(where.low, where.high, step=STEP)
