"""The ground-truth search on Ray Tune: merge, swap into a live engine, evaluate, write the label.

A trial is one plan with the tasks it is still to be evaluated on. Trial actors are reused, so an engine is started once
per actor, and no trial waits for another; each writes its labels itself as soon as it has them. The label store is the
only state: the next run of the same search is a new Tuner over what is missing, and Tune's own state is thrown away.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import EngineError, OutputError
from simmerge_ray.base.storage import Place
from simmerge_ray.capacity.engines import max_seconds, num_engines, rank_needs
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.on_ray.engines import start_evaluator
from simmerge_ray.on_ray.resources import check_room, ray_session
from simmerge_ray.on_ray.tasks import is_short_of_memory
from simmerge_ray.on_ray.tune_adapters import (
    NO_UTILITY,
    EarlyStopping,
    Failures,
    Proposals,
    SearchLimits,
    failure_text,
    trial_result,
)
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.search.evaluation import EvaluationTask
from simmerge_ray.search.evaluation.answers import AnswersTask
from simmerge_ray.search.labels import Infeasible, LabelStore
from simmerge_ray.search.proposers import Proposer, make_proposer
from simmerge_ray.search.runner import EvaluatorStartError, TrialRunner, copy_labels
from simmerge_ray.search.setup import GivenPlans, PreparedSearch, Trial, prepare_search
from simmerge_ray.search.status import SearchStatus

_MAX_FAILURES = 3  # actors that one trial may lose before it counts as infeasible
# The cluster's fault, not the merge's: no label is written, so that the next run tries again.
_CLUSTER_FAULTS = (
    "RuntimeEnvSetupError", "NodeDiedError", "node was terminated", "node has died", "preempted", "StorageError",
    "AccessError",
)  # fmt: skip


class MergeTrial(tune.Trainable):
    """One trial of the search, a step a shard; `config["trial"]` is its text."""

    def setup(self, config: dict[str, Any], search: PreparedSearch) -> None:
        self._search = search
        self._runner = TrialRunner(search, start_evaluator)
        self._runner.begin(Trial.from_text(config["trial"]))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial with the same engine."""
        self._runner.begin(Trial.from_text(new_config["trial"]))
        return True

    def step(self) -> dict[str, Any]:
        try:
            progress = self._runner.step()
        except EvaluatorStartError as error:
            name = self._search.settings.evaluator
            return {"fatal": f"the {name} evaluator did not start: {error}", "utility": NO_UTILITY, "done": True}
        except OutputError as error:
            return {"fatal": str(error), "utility": NO_UTILITY, "done": True}
        return trial_result(self._search, progress)

    def cleanup(self) -> None:
        self._runner.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: labels are the only state."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing."""


@dataclass(frozen=True)
class SearchResult:
    """How a search ended: labels in the store, trials run now, and reasons of the infeasible ones by plan label."""

    store: LabelStore
    search: PreparedSearch
    num_labels: int
    num_trials_run: int
    infeasible: Mapping[str, str]
    status: SearchStatus

    @property
    def num_left(self) -> int:
        """Trials that a limit has kept from running."""
        return self.status.total - self.status.done


def run_search(
    catalogue: Catalogue,
    tasks: Mapping[str, EvaluationTask],
    config: SearchConfig,
    labels_uri: str | Place,
    plans: GivenPlans | None = None,
    report: Callable[[SearchStatus], None] | None = None,
    start: Sequence[MergePlan] = (),
    answers: Mapping[str, Sequence[AnswersTask]] | None = None,
) -> SearchResult:
    """Measure what is missing from the label store. Starts Ray only if something is.

    start: with a budget, plans that are measured before any proposal, and that the search goes on from.
    answers: by owner; what a merge keeps of its members' answers is measured along with its tasks.

    Raises:
        InputError: see `prepare_search`. EngineError: no engine started, labels cannot be written, the first trials all
            failed for one reason, or the cluster lost actors.
    """
    store = LabelStore(labels_uri)
    search = prepare_search(catalogue, tasks, config, store.uri, plans is not None, answers)
    proposer = make_proposer(search, plans, start)
    status = SearchStatus(proposer.total)
    if proposer.total:
        with ray_session():
            status = _run_trials(search, proposer, report)
    labels = store.read()
    failed = [(label, label.outcome) for label in labels if isinstance(label.outcome, Infeasible)]
    infeasible = {f"{label.plan.label} on {label.task}": outcome.reason for label, outcome in failed}
    return SearchResult(store, search, len(labels), status.done, infeasible, status)


def trial_resources(search: PreparedSearch, offered: Collection[str] = ()) -> tune.PlacementGroupFactory:
    """What Tune reserves for an engine: one bundle on one node, or with `executor: ray` a bundle for every rank."""
    config, needs = search.config, rank_needs(search, offered)
    if config.executor == "ray" and config.tensor_parallel > 1:
        share = {kind: amount for kind, amount in needs.items() if kind != "CPU" or not config.gpus_per_trial}
        return tune.PlacementGroupFactory([{"CPU": 1}, *[share] * config.tensor_parallel])
    whole = {kind: amount * config.tensor_parallel for kind, amount in needs.items()}
    return tune.PlacementGroupFactory([{kind: amount for kind, amount in whole.items() if amount}])


def _run_trials(
    search: PreparedSearch, proposer: Proposer, report: Callable[[SearchStatus], None] | None
) -> SearchStatus:
    config = search.config
    resources = trial_resources(search, ray.cluster_resources())
    check_room(resources.bundles[-1], "an engine")
    concurrency = min(num_engines(search, ray.cluster_resources()), proposer.total)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # files a trial that nothing reads,
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)  # and complaints without them
    limits = SearchLimits(max_seconds(config, concurrency))
    proposals = Proposals(search, proposer, limits, report)
    scheduler = None
    if config.num_shards > 1:
        shards = {"max_t": config.num_shards, "grace_period": 1, "reduction_factor": config.reduction_factor}
        scheduler = EarlyStopping(time_attr="training_iteration", metric="utility", mode="max", **shards)
    with tempfile.TemporaryDirectory(prefix="simmerge-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(MergeTrial, search=search), resources),
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
                callbacks=[Failures(proposals)],
            ),
        )
        grid = tuner.fit()
    if limits.fatal:
        raise EngineError(limits.fatal)
    _label_failures(search, grid)
    store = LabelStore(search.labels_uri)
    for trial, rival in sorted(proposals.deferred, key=lambda one: one[1]):
        copy_labels(search, store, trial, trial.rivals[rival], 0.0)
    return proposals.status


def _label_failures(search: PreparedSearch, results: Any) -> None:
    """Label trials that lost one actor after another as infeasible; those that the cluster failed stay missing."""
    store, faults = LabelStore(search.labels_uri), []
    for result in results:
        if result.error is None:
            continue
        told = f"{type(result.error).__name__} {result.error}"
        if is_short_of_memory(result.error) or any(fault in told for fault in _CLUSTER_FAULTS):
            faults.append(failure_text(result.error))
            continue
        trial = Trial.from_text(result.config["trial"])
        reason = f"the trial's actor failed {_MAX_FAILURES + 1} times: {failure_text(result.error)}"
        store.append([search.label(trial.plan, task, Infeasible(reason), 0.0) for task in trial.tasks])
    if faults:
        raise EngineError(
            f"the cluster lost {len(faults)} trials, which have no label: {faults[0]}; the others are kept: run the "
            "same command again (--concurrency 1 if memory is short)"
        )
