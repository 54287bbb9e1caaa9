"""One trial after the other with one evaluator: load the merge, evaluate it shard by shard, write the label."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.errors import CheckpointError, EngineError, OutputError, StorageError
from simmerge_ray.checkpoints.compatibility import check_compatible
from simmerge_ray.merging.engine.fallbacks import linear_form
from simmerge_ray.plans.plan import MergePlan, ResolvedPlan, resolve_plan
from simmerge_ray.search.evaluation import Evaluator, shards
from simmerge_ray.search.labels import Infeasible, LabelStore, Measured, Outcome
from simmerge_ray.search.setup import PreparedSearch, Trial

_log = logging.getLogger(__name__)


class EvaluatorStartError(EngineError):
    """The evaluator did not start, so no trial can be measured: the search ends, and no label is written for it."""


@dataclass(frozen=True)
class TrialProgress:
    """Where a trial stands after a shard.

    items: utilities of the items evaluated so far, by task; empty for a merge that cannot be measured, or that was not
    evaluated. finished: the labels are written (or, `rival` set, are to be copied from that rival once it has them).
    num_new: items evaluated in this step.
    """

    items: Mapping[str, np.ndarray]
    finished: bool
    num_new: int = 0
    infeasible: str | None = None
    rival: int | None = None

    @property
    def utilities(self) -> dict[str, float]:
        """Mean utility by task of what was evaluated."""
        return {task: float(items.mean()) for task, items in self.items.items()}


class TrialRunner:
    """Runs trials of a search. A plain class: `on_ray.merge_search.MergeTrial` puts it into Ray Tune.

    Args:
        start: starts an evaluator; called when there is none, and again after a failed swap.
    """

    def __init__(self, search: PreparedSearch, start: Callable[[PreparedSearch], Evaluator]) -> None:
        self._search, self._start = search, start
        self._store = LabelStore(search.labels_uri)
        self._evaluator: Evaluator | None = None
        self._trial: Trial | None = None
        self._fitting: set[frozenset[str]] = set()

    def begin(self, trial: Trial) -> None:
        """Take the next trial; an unfinished one before it is forgotten."""
        self._trial = trial
        self._resolved = resolve_plan(trial.plan, self._search.catalogue)
        self._started = 0.0
        self._loaded, self._failures, self._shard = False, 0, 0
        sizes = {task: self._search.task(task).num_items for task in trial.tasks}
        self._parts = {task: shards(size, trial.num_shards) for task, size in sizes.items()}
        self._items = {task: np.full(size, np.nan) for task, size in sizes.items()}

    def run(self, trial: Trial) -> TrialProgress:
        """All shards of a trial."""
        self.begin(trial)
        while not (progress := self.step()).finished:
            pass
        return progress

    def step(self) -> TrialProgress:
        """Evaluate the next shard; the last one writes the labels.

        A trial that is the same merge as a rival is not evaluated: its labels are copied, if the rival has them. A
        trial that fails is tried once more with a new evaluator.

        Raises:
            EvaluatorStartError: the evaluator does not start. OutputError: a label cannot be written.
        """
        trial = self._trial
        assert trial is not None
        if self._shard == 0:  # not in `begin`: Tune may take its time between the two
            self._started = time.monotonic()
        if not self._loaded and self._failures == 0 and (number := self._same_merge(trial)) is not None:
            seconds = time.monotonic() - self._started
            copied = copy_labels(self._search, self._store, trial, trial.rivals[number], seconds)
            return TrialProgress({}, True, rival=number) if copied is None else _finished(copied)
        while True:
            evaluator = self._ready_evaluator()
            try:
                if not self._loaded:
                    self._check_fit(self._resolved)
                    evaluator.load(self._resolved)
                    self._loaded = True
                return self._evaluate(evaluator, trial)
            except (StorageError, OutputError):
                raise  # the store's fault, not the merge's: no label
            except CheckpointError as error:
                return self._written(trial, dict.fromkeys(trial.tasks, Infeasible(str(error))))
            except (EngineError, RuntimeError, ValueError, MemoryError) as error:
                _log.exception("attempt %d at %s failed", self._failures + 1, trial.plan.label)
                self.close()
                self._loaded = False
                self._failures += 1
                if self._failures == 2:
                    reason = Infeasible(f"{type(error).__name__}: {error}")
                    return self._written(trial, dict.fromkeys(trial.tasks, reason))

    def _evaluate(self, evaluator: Evaluator, trial: Trial) -> TrialProgress:
        num_new = 0
        for task in trial.tasks:
            if self._shard < len(self._parts[task]):
                part = self._parts[task][self._shard]
                self._items[task][part] = self._search.task(task).evaluate(evaluator, part)
                num_new += len(part)
        self._shard += 1
        if self._shard < max(len(parts) for parts in self._parts.values()):
            evaluated = {task: items[~np.isnan(items)] for task, items in self._items.items()}
            return TrialProgress(evaluated, False, num_new)
        return self._written(trial, {task: Measured(items) for task, items in self._items.items()}, num_new)

    def _written(self, trial: Trial, outcomes: Mapping[str, Outcome], num_new: int = 0) -> TrialProgress:
        seconds = (time.monotonic() - self._started) / len(outcomes)
        self._store.append([self._search.label(trial.plan, task, one, seconds) for task, one in outcomes.items()])
        return _finished(outcomes, num_new)

    def _check_fit(self, resolved: ResolvedPlan) -> None:
        """Refuse checkpoints that do not fit each other (any more); each set of them is looked at once."""
        ids = frozenset(ref.id for ref in resolved.used_refs)
        if ids not in self._fitting:
            check_compatible(resolved.used_refs)
            self._fitting.add(ids)

    def _same_merge(self, trial: Trial) -> int | None:
        """Number of the first rival that makes the same merge."""
        with suppress(CheckpointError):  # the evaluation will say what is wrong
            own = linear_form(self._resolved) if trial.rivals else trial.plan
            for number, rival in enumerate(trial.rivals):
                if own != trial.plan and linear_form(resolve_plan(rival, self._search.catalogue)).id == own.id:
                    return number
        return None

    def _ready_evaluator(self) -> Evaluator:
        if self._evaluator is None:
            try:
                self._evaluator = self._start(self._search)
            except StorageError:
                raise
            except Exception as error:  # whatever the engine raises: without it no trial can be measured
                _log.exception("the evaluator did not start")
                raise EvaluatorStartError(f"{type(error).__name__}: {error}") from error
        return self._evaluator

    def close(self) -> None:
        """Close the evaluator."""
        close = getattr(self._evaluator, "close", None)
        self._evaluator = None
        if close:
            close()


def _finished(outcomes: Mapping[str, Outcome], num_new: int = 0) -> TrialProgress:
    items = {task: one.items for task, one in outcomes.items() if isinstance(one, Measured)}
    reasons = [one.reason for one in outcomes.values() if isinstance(one, Infeasible)]
    return TrialProgress(items, True, num_new, reasons[0] if reasons else None)


def copy_labels(
    search: PreparedSearch, store: LabelStore, trial: Trial, rival: MergePlan, seconds: float
) -> dict[str, Outcome] | None:
    """Label a trial with the outcomes of a rival that is the same merge; None if one of them is not there yet."""
    known = {label.key: label.outcome for label in store.read()}
    keys = {task: search.key(rival, task) for task in trial.tasks}
    if any(not isinstance(known.get(key), Measured | Infeasible) for key in keys.values()):
        return None
    outcomes = {task: known[key] for task, key in keys.items()}
    share = seconds / len(trial.tasks)
    store.append([search.label(trial.plan, task, one, share, same_as=rival) for task, one in outcomes.items()])
    return outcomes
