"""What is measured next: every missing trial in order, or what Optuna proposes from the results so far."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from simmerge_ray.base.errors import ConfigError, unknown_name
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.search.labels import Infeasible, LabeledPlan, Stopped
from simmerge_ray.search.runner import TrialProgress
from simmerge_ray.search.setup import PreparedSearch, Trial, grid_trials
from simmerge_ray.search.space import STEP, Range

SAMPLERS = ("tpe", "cmaes", "random")
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
    repeated proposal gets its known value and costs nothing.
    """

    def __init__(self, search: PreparedSearch, first: Sequence[Trial]) -> None:
        super().__init__(first)
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        assert search.space is not None and search.config.budget is not None
        self._states = optuna.trial.TrialState
        self._search, self._space = search, search.space
        self._optuna = optuna.create_study(
            directions=["maximize"] * len(search.objectives),
            sampler=make_sampler(search.config.sampler, search.config.seed),
        )
        self._running: dict[str, tuple[Any, MergePlan]] = {}
        self._known: dict[str, list[float] | None] = {}
        for plan, labels in search.labels().items():
            self._tell_stored(plan, labels)
        self._num_left = max(0, search.config.budget - len(self._known))
        self.total += self._num_left

    def propose(self, number: str) -> Trial | None:
        if self._trials:
            return super().propose(number)
        for _ in range(_MAX_REPEATS if self._num_left else 0):
            trial = self._optuna.ask()
            plan = self._space.plan(partial(_suggest, trial))
            if plan.id not in self._known:
                self._known[plan.id] = None
                self._running[number] = (trial, plan)
                self._num_left -= 1
                return Trial(plan, self._search.asked_of(plan), num_shards=self._search.config.num_shards)
            values = self._known[plan.id]
            self._optuna.tell(trial, values, state=self._states.COMPLETE if values else self._states.FAIL)
        self.total, self._num_left = self.total - self._num_left, 0  # nothing new is left
        return None

    def report(self, number: str, step: int, utilities: Mapping[str, float]) -> None:
        if number in self._running and len(self._search.objectives) == 1:
            self._running[number][0].report(self._search.values(utilities)[0], step)

    def finish(self, number: str, progress: TrialProgress | None) -> None:
        if number not in self._running:
            return
        trial, plan = self._running.pop(number)
        if progress is None or progress.infeasible is not None or not progress.items:
            self._optuna.tell(trial, state=self._states.FAIL)
        elif not progress.finished:
            self._optuna.tell(trial, state=self._states.PRUNED)
        else:
            values = list(self._search.values(progress.utilities))
            self._known[plan.id] = values
            self._optuna.tell(trial, values)

    def _tell_stored(self, plan: MergePlan, labels: Mapping[str, LabeledPlan]) -> None:
        """Add a finished trial to Optuna's, if the plan is one of the space and has all labels."""
        found = self._space.parameters(plan) if plan.steps else None
        if found is None or set(labels) != set(self._search.tasks_of(plan)):
            return
        from optuna.trial import create_trial

        outcomes = {task: label.outcome for task, label in labels.items()}
        utilities = {task: one.utility for task, one in outcomes.items() if not isinstance(one, Infeasible)}
        state, values, reported = self._states.FAIL, None, {}
        if len(utilities) == len(outcomes):
            values = list(self._search.values(utilities))
            state = self._states.COMPLETE
            if any(isinstance(one, Stopped) for one in outcomes.values()):
                if len(values) > 1:
                    return  # stopped by a search with one objective; this one does not stop trials
                state, reported, values = self._states.PRUNED, {1: values[0]}, None
        self._known[plan.id] = values
        self._optuna.add_trial(
            create_trial(
                state=state,
                values=values,
                params={name: value for name, (value, _) in found.items()},
                distributions={name: _distribution(where) for name, (_, where) in found.items()},
                intermediate_values=reported,
            )
        )


def make_proposer(study: PreparedSearch, plans: Sequence[MergePlan] | None = None) -> Proposer:
    """All missing trials in order; with a budget, unmerged checkpoints first and then Optuna's proposals."""
    if study.space is None or plans is not None:
        return Proposer(grid_trials(study, plans))
    singles = dict.fromkeys(member for subset in study.space.subsets for member in subset)
    names = [*([study.catalogue.base.id] if study.catalogue.base else []), *singles]
    return OptunaProposer(study, grid_trials(study, [MergePlan(source=name) for name in dict.fromkeys(names)]))


def make_sampler(name: str, seed: int) -> Any:
    """Optuna's sampler of that name: `tpe` (multivariate), `cmaes`, or `random`. Raises ConfigError: unknown."""
    import optuna

    if name not in SAMPLERS:
        raise ConfigError(unknown_name("sampler", name, SAMPLERS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            # Several trials run at once: the liar keeps their proposals apart.
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        if name == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        return optuna.samplers.RandomSampler(seed=seed)


def _suggest(trial: Any, name: str, where: Range) -> Any:
    if where.choices:
        return trial.suggest_categorical(name, where.choices)
    return trial.suggest_float(name, where.low, where.high, step=STEP)


def _distribution(where: Range) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if where.choices:
        return CategoricalDistribution(where.choices)
    return FloatDistribution(where.low, where.high, step=STEP)
