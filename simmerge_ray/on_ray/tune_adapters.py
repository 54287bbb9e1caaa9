"""What Ray Tune is given: a proposer as its searcher, limits as its stopper, early stopping as its scheduler."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher
from ray.tune.utils.util import unflatten_dict
from ray.util import metrics

from simmerge_ray.on_ray.tasks import is_short_of_memory, last_line, loss_text
from simmerge_ray.search.labels import LabelStore, Measured, Outcome, Stopped
from simmerge_ray.search.proposers import Proposer
from simmerge_ray.search.runner import TrialProgress
from simmerge_ray.search.setup import PreparedSearch, Trial
from simmerge_ray.search.status import SearchStatus

NO_UTILITY = -1.0  # what Tune is told of a merge without one


class _Metrics:
    """The status as Prometheus metrics of the cluster."""

    def __init__(self) -> None:
        self._trials = metrics.Counter("simmerge_search_trials_total", "Trials that ended", tag_keys=("outcome",))
        self.items = metrics.Counter("simmerge_search_items_total", "Items evaluated")
        self._left = metrics.Gauge("simmerge_search_trials_left", "Trials that have not ended")
        self._best = metrics.Gauge("simmerge_search_best_utility", "Best utility of a merge so far")
        self._seconds = metrics.Histogram(
            "simmerge_search_trial_seconds", "Seconds of a trial", boundaries=[0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]
        )

    def ended(self, outcome: str, seconds: float, status: SearchStatus) -> None:
        self._trials.inc(1, tags={"outcome": outcome})
        self._seconds.observe(seconds)
        self._left.set(status.total - status.done)
        if status.best:
            self._best.set(status.best[1])


class SearchLimits(tune.Stopper):
    """Ends the whole search when a trial reports that none can succeed, or when its time is over."""

    def __init__(self, max_seconds: float | None) -> None:
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self.fatal: str | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self.fatal = self.fatal or result.get("fatal")
        return self.fatal is not None

    def stop_all(self) -> bool:
        return self.fatal is not None or (self._deadline is not None and time.monotonic() > self._deadline)


class Proposals(Searcher):
    """Hands a proposer's trials to Tune and their results back, and keeps count.

    Tune copies and pickles what it is given; this object stays one and is never restored: the label store is the state.
    """

    def __init__(
        self,
        search: PreparedSearch,
        proposer: Proposer,
        limits: SearchLimits,
        report: Callable[[SearchStatus], None] | None,
    ) -> None:
        super().__init__(metric="utility", mode="max")
        self._search, self._proposer, self._limits, self._report = search, proposer, limits, report
        self._store, self._metrics, self._started = LabelStore(search.labels_uri), _Metrics(), time.monotonic()
        self._trials: dict[str, tuple[Trial, float]] = {}
        self._num_given_out = 0
        self._max_trials = search.config.max_trials or float("inf")
        self.status = SearchStatus(int(min(proposer.total, self._max_trials)))
        self.deferred: list[tuple[Trial, int]] = []

    def __deepcopy__(self, memo: Any) -> Proposals:
        return self

    def __reduce__(self) -> Any:
        return (str, ())  # Tune keeps a pickle of its arguments that nothing reads

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._num_given_out >= self._max_trials or self._limits.stop_all():
            return Searcher.FINISHED
        if (trial := self._proposer.propose(trial_id)) is None:
            return Searcher.FINISHED
        self._num_given_out += 1
        self._trials[trial_id] = (trial, time.monotonic())
        return {"trial": trial.to_text(), "single": trial.plan.source is not None}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._count_items(result)
        if result.get("utilities") and not result["finished"]:
            self._proposer.report(trial_id, result["training_iteration"], result["utilities"])
            self._tell()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial, started = self._trials[trial_id]
        if error or not result or "fatal" in result:
            self._proposer.finish(trial_id, None)
            self._end("failed", started)  # why: see `Failures`
            return
        result = unflatten_dict(result)
        self._count_items(result)
        progress = _progress_of(result)
        if not progress.finished:
            if self._limits.stop_all():
                self._proposer.finish(trial_id, None)  # cut off, not judged: the next run evaluates it
                return
            outcomes: dict[str, Outcome] = {}
            for task, items in progress.items.items():  # a short task may be through already
                whole = len(items) == self._search.task(task).num_items
                outcomes[task] = Measured(items) if whole else Stopped(items)
            share = (time.monotonic() - started) / len(outcomes)
            self._store.append([self._search.label(trial.plan, task, one, share) for task, one in outcomes.items()])
        if progress.rival is not None:
            self.deferred.append((trial, progress.rival))
        self._proposer.finish(trial_id, progress)
        if progress.finished and progress.items and trial.plan.is_merge:
            value = self._search.values(progress.utilities)[0]
            if not math.isnan(value) and (self.status.best is None or value > self.status.best[1]):
                self.status.best = (trial.plan.label, value)
        if progress.infeasible:
            self.status.failures.append((trial.plan.label, progress.infeasible))
        kind = "infeasible" if progress.infeasible else "measured" if progress.finished else "stopped"
        self._end(kind, started)

    def lost(self, trial_id: str, reason: str, is_last: bool) -> None:
        """A trial has lost an actor."""
        into = self.status.failures if is_last else self.status.setbacks
        into.append((self._trials[trial_id][0].plan.label, reason))
        self._tell()

    def _count_items(self, result: Mapping[str, Any]) -> None:
        # Tune passes the last result of a trial only to `on_trial_complete`.
        if count := int(result.get("num_new") or 0):
            self.status.num_items += count
            self._metrics.items.inc(count)

    def _end(self, outcome: str, started: float) -> None:
        self.status.done += 1
        self.status.failed += outcome in ("failed", "infeasible")
        self.status.total = int(min(self._proposer.total, self._max_trials))
        self._metrics.ended(outcome, time.monotonic() - started, self.status)
        self._tell()

    def _tell(self) -> None:
        self.status.seconds = time.monotonic() - self._started
        self._limits.fatal = self._limits.fatal or self.status.hopeless
        if self._report:
            self._report(self.status)

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_bytes(b"")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see the class."""


def trial_result(search: PreparedSearch, progress: TrialProgress) -> dict[str, Any]:
    """What a trial tells Tune after a shard; `_progress_of` reads it."""
    utilities = progress.utilities
    told = {name: getattr(progress, name) for name in ("utilities", "num_new", "finished", "infeasible", "rival")}
    utility = search.values(utilities)[0]
    utility = NO_UTILITY if math.isnan(utility) else utility
    items = {} if progress.finished else {task: items.tolist() for task, items in progress.items.items()}
    return told | {"utility": utility, "items": items, "done": progress.finished}


def _progress_of(result: Mapping[str, Any]) -> TrialProgress:
    kept = result.get("items") or {}
    if result["finished"]:  # the labels hold the items; their means are enough here
        kept = {task: [mean] for task, mean in (result.get("utilities") or {}).items()}
    items = {task: np.array(values, dtype=np.float64) for task, values in kept.items()}
    return TrialProgress(items, result["finished"], 0, result.get("infeasible"), result.get("rival"))


def failure_text(error: BaseException | None) -> str:
    """Why a trial's actor failed, in one line."""
    return loss_text(error) if error is not None and is_short_of_memory(error) else last_line(error)


class Failures(tune.Callback):
    """Why trials have lost their actors, which Tune does not tell a searcher."""

    def __init__(self, proposals: Proposals) -> None:
        self._proposals = proposals

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._proposals.lost(trial.trial_id, failure_text(trial.get_pickled_error()), is_last=True)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._proposals.lost(trial.trial_id, failure_text(trial.get_pickled_error()), is_last=False)


class EarlyStopping(ASHAScheduler):
    """ASHA on the shards of proposed merges; unmerged checkpoints are evaluated whole and do not count as rivals."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self.CONTINUE if trial.config["single"] else super().on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if not trial.config["single"]:
            super().on_trial_complete(tune_controller, trial, result)
