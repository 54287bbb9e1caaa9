"""The ground-truth search on Ray Tune: merge, swap into a live engine, evaluate, write the label.

A trial is one plan with the tasks it is still to be evaluated on. Trial actors are reused, so an engine is started once
per actor, and no trial waits for another; each writes its labels itself as soon as it has them. The label store is the
only state: the next run of the same search is a new Tuner over what is missing, and Tune's own state is thrown away.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher
from ray.util import metrics

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import EngineError
from simmerge_ray.base.storage import Place
from simmerge_ray.capacity.placement import engine_needs, how_many_fit
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.merging.write.directory import MAX_THREADS
from simmerge_ray.on_ray.resources import check_room, offered_resources, ray_session
from simmerge_ray.plans.plan import MergePlan, unmerged
from simmerge_ray.search.estimate import engine_bytes
from simmerge_ray.search.evaluation import EvaluationTask, Evaluator
from simmerge_ray.search.labels import Infeasible, LabelStore, Measured, Outcome, Stopped
from simmerge_ray.search.proposers import GridProposer, OptunaProposer, Proposer
from simmerge_ray.search.runner import EvaluatorStartError, TrialProgress, TrialRunner, copy_labels
from simmerge_ray.search.setup import PreparedSearch, Trial, grid_trials, prepare_search
from simmerge_ray.search.status import SearchStatus

_log = logging.getLogger(__name__)
_NO_UTILITY = -1.0  # what Tune is told of a merge without one
_MAX_FAILURES = 3  # actors that one trial may lose before it counts as infeasible
# The cluster's fault, not the merge's: no label is written, so that the next run tries again.
_CLUSTER_FAULTS = (
    "RuntimeEnvSetupError", "NodeDiedError", "node was terminated", "node has died", "preempted", "StorageError",
    "AccessError",
)  # fmt: skip


def start_evaluator(study: PreparedSearch) -> Evaluator:
    """The evaluator that the settings name; a vLLM engine passes its self-check before it makes a label.

    Raises:
        EngineError: the check failed.
    """
    config, settings = study.config, study.settings
    threads = min(MAX_THREADS, max(1, int(config.cpus_per_trial)))  # a rank's cores merge while its GPU waits
    if settings.evaluator == "transformers":
        from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator

        device = "cuda" if config.gpus_per_trial > 0 else "cpu"
        return TransformersEvaluator(
            study.template,
            settings.dtype,
            device=device,
            max_model_len=settings.max_model_len,
            merge_threads=threads,
        )
    from simmerge_ray.on_ray.vllm_evaluator import VllmEvaluator

    engine = VllmEvaluator(
        study.template,
        settings.dtype,
        settings.max_model_len,
        tensor_parallel_size=config.tensor_parallel,
        distributed_executor_backend=config.executor if config.tensor_parallel > 1 else None,
        gpu_memory_utilization=0.9 * config.gpus_per_trial if 0 < config.gpus_per_trial < 1 else None,
        merge_threads=threads,
    )
    engine.check_swap(unmerged(study.other), check_prompts(study, engine.tokenizer))
    return engine


def check_prompts(study: PreparedSearch, tokenizer: Any, count: int = 16) -> list[list[int]]:
    """Token ids on which an engine is checked: the first prompts of the first task of our own, or plain tokens."""
    from simmerge_ray.search.evaluation import Task
    from simmerge_ray.search.evaluation.prompts import encode_prompts

    for _, task in sorted(study.tasks.items()):
        if isinstance(task, Task):
            return encode_prompts(task, task.items[:count], tokenizer)
    return [[(7 * place + number) % len(tokenizer) for place in range(1, 9)] for number in range(count)]


class MergeTrial(tune.Trainable):
    """One trial of the search, a step a shard; `config["trial"]` is its text."""

    def setup(self, config: dict[str, Any], study: PreparedSearch) -> None:
        self._study = study
        self._runner = TrialRunner(study, start_evaluator)
        self._runner.begin(Trial.from_text(config["trial"]))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial with the same engine."""
        self._runner.begin(Trial.from_text(new_config["trial"]))
        return True

    def step(self) -> dict[str, Any]:
        try:
            progress = self._runner.step()
        except EvaluatorStartError as error:
            return {"fatal": str(error), "utility": _NO_UTILITY, "done": True}
        utilities = progress.utilities
        return {
            "utility": self._study.values(utilities)[0] if utilities else _NO_UTILITY,
            "items": {} if progress.finished else {task: items.tolist() for task, items in progress.items.items()},
            "utilities": utilities,
            "num_new": progress.num_new,
            "finished": progress.finished,
            "infeasible": progress.infeasible,
            "rival": progress.rival,
            "done": progress.finished,
        }

    def cleanup(self) -> None:
        self._runner.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: labels are the only state."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing."""


class _Metrics:
    """The status as Prometheus metrics of the cluster."""

    def __init__(self) -> None:
        self._trials = metrics.Counter("simmerge_search_trials_total", "Trials that ended", tag_keys=("outcome",))
        self._items = metrics.Counter("simmerge_search_items_total", "Items evaluated")
        self._left = metrics.Gauge("simmerge_search_trials_left", "Trials that have not ended")
        self._best = metrics.Gauge("simmerge_search_best_utility", "Best utility of a merge so far")
        self._seconds = metrics.Histogram(
            "simmerge_search_trial_seconds", "Seconds of a trial", boundaries=[0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]
        )

    def items(self, count: int) -> None:
        if count:
            self._items.inc(count)

    def ended(self, outcome: str, seconds: float, status: SearchStatus) -> None:
        self._trials.inc(1, tags={"outcome": outcome})
        self._seconds.observe(seconds)
        self._left.set(status.total - status.done)
        if status.best:
            self._best.set(status.best[1])


class _Limits(tune.Stopper):
    """Ends the whole search: at the first trial that says that no other can succeed, or when its time is over."""

    def __init__(self, max_seconds: float | None) -> None:
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self.fatal: str | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self.fatal = self.fatal or result.get("fatal")
        return self.fatal is not None

    @property
    def out_of_time(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def stop_all(self) -> bool:
        return self.fatal is not None or self.out_of_time


class _Proposals(Searcher):
    """Hands a proposer's trials to Tune and their results back, and keeps count.

    Tune copies and pickles what it is given; this object stays one and is never restored: the label store is the state.
    """

    def __init__(
        self, study: PreparedSearch, proposer: Proposer, limits: _Limits, report: Callable[[SearchStatus], None] | None
    ) -> None:
        super().__init__(metric="utility", mode="max")
        self._study, self._proposer, self._limits, self._report = study, proposer, limits, report
        self._store = LabelStore(study.labels_uri)
        self._trials: dict[str, tuple[Trial, float]] = {}
        self._metrics = _Metrics()
        self._started = time.monotonic()
        self._num_given_out = 0
        self._max_trials = study.config.max_trials or float("inf")
        self.status = SearchStatus(int(min(proposer.total, self._max_trials)))
        self.deferred: list[tuple[Trial, int]] = []

    def __deepcopy__(self, memo: Any) -> _Proposals:
        return self

    def __reduce__(self) -> Any:
        return (str, ())  # Tune keeps a pickle of its arguments that nothing reads

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._num_given_out >= self._max_trials or self._limits.stop_all():
            return Searcher.FINISHED
        trial = self._proposer.propose(trial_id)
        if trial is None:
            return Searcher.FINISHED
        self._num_given_out += 1
        self._trials[trial_id] = (trial, time.monotonic())
        return {"trial": trial.to_text(), "single": trial.plan.source is not None}

    def trial_of(self, trial_id: str) -> Trial:
        """The trial that was given out under a name."""
        return self._trials[trial_id][0]

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._count_items(result)
        if result.get("utilities") and not result["finished"]:
            self._proposer.report(trial_id, result["training_iteration"], result["utilities"])
            self._tell()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial, started = self._trials[trial_id]
        if error or not result or "fatal" in result:
            self._proposer.finish(trial_id, None)
            self._end("failed", started)
            return
        result = _unflattened(result)
        self._count_items(result)
        progress = _progress_of(result)
        if not progress.finished and self._limits.stop_all():
            self._proposer.finish(trial_id, None)  # cut off, not judged: the next run evaluates it
            return
        if not progress.finished:
            outcomes: dict[str, Outcome] = {}
            for task, items in progress.items.items():  # a short task may be through already
                whole = len(items) == self._study.tasks[task].num_items
                outcomes[task] = Measured(items) if whole else Stopped(items)
            share = (time.monotonic() - started) / len(outcomes)
            self._store.append([self._study.label(trial.plan, task, one, share) for task, one in outcomes.items()])
        if progress.rival is not None:
            self.deferred.append((trial, progress.rival))
        self._proposer.finish(trial_id, progress)
        if progress.finished and progress.items and trial.plan.steps:
            value = self._study.values(progress.utilities)[0]
            if self.status.best is None or value > self.status.best[1]:
                self.status.best = (trial.plan.label, value)
        kind = "infeasible" if progress.infeasible else "measured" if progress.finished else "stopped"
        self._end(kind, started)

    def _count_items(self, result: Mapping[str, Any]) -> None:
        # Tune passes the last result of a trial only to `on_trial_complete`.
        self.status.num_items += int(result.get("num_new") or 0)
        self._metrics.items(int(result.get("num_new") or 0))

    def _end(self, outcome: str, started: float) -> None:
        self.status.done += 1
        self.status.failed += outcome in ("failed", "infeasible")
        self.status.total = int(min(self._proposer.total, self._max_trials))
        self._metrics.ended(outcome, time.monotonic() - started, self.status)
        self._tell()

    def _tell(self) -> None:
        self.status.seconds = time.monotonic() - self._started
        if self._report:
            self._report(self.status)

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_bytes(b"")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see the class."""


def _unflattened(result: dict[str, Any]) -> dict[str, Any]:
    from ray.tune.utils.util import unflatten_dict

    return unflatten_dict(result)


def _progress_of(result: Mapping[str, Any]) -> TrialProgress:
    kept = result.get("items") or {}
    items = {task: np.array(values, dtype=np.float64) for task, values in kept.items()}
    if result["finished"]:  # the labels hold the items; their means are enough here
        items = {task: np.array([mean], dtype=np.float64) for task, mean in (result.get("utilities") or {}).items()}
    return TrialProgress(items, result["finished"], 0, result.get("infeasible"), result.get("rival"))


class _EarlyStopping(ASHAScheduler):
    """ASHA on the shards of proposed merges; unmerged checkpoints are evaluated whole and do not count as rivals."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if not trial.config["single"]:
            super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self.CONTINUE if trial.config["single"] else super().on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if not trial.config["single"]:
            super().on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        if not trial.config["single"]:
            super().on_trial_remove(tune_controller, trial)


@dataclass(frozen=True)
class SearchResult:
    """How a search ended: labels in the store, trials run now, and reasons of the infeasible ones by plan label.

    unfinished: trials that were to be run and were not, because a limit was reached.
    """

    store: LabelStore
    study: PreparedSearch
    num_labels: int
    num_trials_run: int
    infeasible: Mapping[str, str]
    status: SearchStatus

    @property
    def num_left(self) -> int:
        return self.status.total - self.status.done


def make_proposer(study: PreparedSearch, plans: Sequence[MergePlan] | None = None) -> Proposer:
    """All missing trials in order; with a budget, unmerged checkpoints first and then Optuna's proposals."""
    if study.space is None or plans is not None:
        return GridProposer(grid_trials(study, plans))
    singles = dict.fromkeys(member for subset in study.space.subsets for member in subset)
    names = [*([study.catalogue.base.id] if study.catalogue.base else []), *singles]
    return OptunaProposer(study, grid_trials(study, [MergePlan(source=name) for name in dict.fromkeys(names)]))


def run_search(
    catalogue: Catalogue,
    tasks: Mapping[str, EvaluationTask],
    config: SearchConfig,
    labels_uri: str | Place,
    plans: Sequence[MergePlan] | None = None,
    report: Callable[[SearchStatus], None] | None = None,
) -> SearchResult:
    """Measure what is missing from the label store. Starts Ray only if something is.

    Raises:
        InputError: see `search.setup.prepare_search`.
        EvaluatorStartError: no engine could be started. EngineError: the cluster could not set up an actor.
    """
    store = LabelStore(labels_uri)
    study = prepare_search(catalogue, tasks, config, store.uri)
    proposer = make_proposer(study, plans)
    status = SearchStatus(proposer.total)
    if proposer.total:
        with ray_session():
            status = _run_trials(study, proposer, report)
    labels = store.read()
    infeasible = {
        f"{label.plan.label} on {label.task}": label.outcome.reason
        for label in labels
        if isinstance(label.outcome, Infeasible)
    }
    return SearchResult(store, study, len(labels), status.done, infeasible, status)


def rank_needs(study: PreparedSearch, offered: Collection[str] = ()) -> dict[str, float]:
    """What one rank of an engine needs, by Ray's names.

    Args:
        offered: names of the resources of the cluster; where its nodes say how large their GPUs are, one that holds
            the model is asked for.
    """
    config = study.config
    held = engine_bytes(study.template, study.settings.evaluator, study.settings.dtype)
    return engine_needs(held, config.cpus_per_trial, config.gpus_per_trial, config.tensor_parallel, offered)


def trial_resources(study: PreparedSearch, offered: Collection[str] = ()) -> tune.PlacementGroupFactory:
    """What Tune reserves for an engine: one bundle on one node, or with `executor: ray` a bundle for every rank."""
    config, needs = study.config, rank_needs(study, offered)
    if config.executor == "ray" and config.tensor_parallel > 1:
        share = {kind: amount for kind, amount in needs.items() if kind != "CPU" or not config.gpus_per_trial}
        return tune.PlacementGroupFactory([{"CPU": 1}, *[share] * config.tensor_parallel])
    whole = {kind: amount * config.tensor_parallel for kind, amount in needs.items()}
    return tune.PlacementGroupFactory([{kind: amount for kind, amount in whole.items() if amount}])


def engines_that_fit(study: PreparedSearch, resources: Mapping[str, float]) -> int:
    """How many engines a cluster has room for now; at least one, which then waits for its node to come up.

    Args:
        resources: CPU, GPU and memory (bytes) as Ray names them; memory counts where the engines run on CPUs.
    """
    whole = {kind: amount * study.config.tensor_parallel for kind, amount in rank_needs(study, resources).items()}
    room = how_many_fit(whole, resources)
    return max(1, min(room, study.config.concurrency or room))


def num_engines(study: PreparedSearch, resources: Mapping[str, float]) -> int:
    """How many engines a search starts: as many as it was told, even where there is no room for them now, since Ray
    then asks for nodes and the rest goes on without them; else as many as fit."""
    return study.config.concurrency or engines_that_fit(study, resources)


def _run_trials(
    study: PreparedSearch, proposer: Proposer, report: Callable[[SearchStatus], None] | None
) -> SearchStatus:
    config = study.config
    resources = trial_resources(study, offered_resources())
    check_room(resources.bundles[-1], "an engine")
    concurrency = min(num_engines(study, ray.cluster_resources()), proposer.total)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # files a trial that nothing reads,
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)  # and complaints without them
    limits = _Limits(_max_seconds(config, concurrency))
    proposals = _Proposals(study, proposer, limits, report)
    scheduler = None
    if config.num_shards > 1:
        scheduler = _EarlyStopping(
            time_attr="training_iteration",
            metric="utility",
            mode="max",
            max_t=config.num_shards,
            grace_period=1,
            reduction_factor=config.reduction_factor,
        )
    with tempfile.TemporaryDirectory(prefix="simmerge-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(MergeTrial, study=study), resources),
            tune_config=tune.TuneConfig(
                search_alg=proposals,
                scheduler=scheduler,
                num_samples=-1,
                reuse_actors=True,
                max_concurrent_trials=concurrency,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=scratch,
                verbose=0,
                stop=limits,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=_MAX_FAILURES),
            ),
        )
        grid = tuner.fit()
    if limits.fatal:
        raise EvaluatorStartError(f"the {study.settings.evaluator} evaluator did not start: {limits.fatal}")
    _label_failures(study, grid)
    store = LabelStore(study.labels_uri)
    for trial, rival in sorted(proposals.deferred, key=lambda one: one[1]):
        copy_labels(study, store, trial, trial.rivals[rival], 0.0)
    return proposals.status


def _max_seconds(config: SearchConfig, concurrency: int) -> float | None:
    hours = [config.max_hours] if config.max_hours else []
    gpus = concurrency * config.gpus_per_trial * config.tensor_parallel
    if config.max_gpu_hours and gpus:
        hours.append(config.max_gpu_hours / gpus)
    return 3600 * min(hours) if hours else None


def _label_failures(study: PreparedSearch, results: Any) -> None:
    """Trials that lost one actor after another become infeasible; where the cluster was at fault they stay missing."""
    store, faults = LabelStore(study.labels_uri), []
    for result in results:
        if result.error is None:
            continue
        if any(fault in f"{type(result.error).__name__} {result.error}" for fault in _CLUSTER_FAULTS):
            faults.append(_last_line(result.error))
            continue
        trial = Trial.from_text(result.config["trial"])
        reason = f"the trial's actor failed {_MAX_FAILURES + 1} times: {_last_line(result.error)}"
        store.append([study.label(trial.plan, task, Infeasible(reason), 0.0) for task in trial.tasks])
    if faults:
        raise EngineError(f"the cluster lost {len(faults)} trials, which have no label: {faults[0]}")


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]
