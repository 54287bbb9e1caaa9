"""Ground-truth search on Ray Tune: merge, swap into a live engine, evaluate, write the label.

A trial is one plan with the tasks it is still to be evaluated on. Trial actors are reused, so an engine is started once
per actor; each writes its labels itself as soon as it has them. The label store is the only state: the next run of the
same search is a new Tuner over the keys that are missing.

Arms may make the same merge: SLERP between close checkpoints is the linear average. A trial that finds itself equal to
another plan of the search is not evaluated; its labels are copies of that plan's, and say so.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune

from simmerge_ray.catalogue import Catalogue
from simmerge_ray.checkpoints import CheckpointRef, read_config
from simmerge_ray.config import SearchConfig
from simmerge_ray.distributed.resources import ray_session
from simmerge_ray.errors import CheckpointError, ConfigError, EngineError, LabelError, TaskError, unknown_name
from simmerge_ray.evaluation import Evaluator, Task
from simmerge_ray.evaluation.prompts import encode_prompts
from simmerge_ray.labels import (
    EvaluationSettings,
    Infeasible,
    LabeledPlan,
    LabelStore,
    Measured,
    Outcome,
    label_key,
    used_digests,
)
from simmerge_ray.merging.fallbacks import SPHERICAL, all_linear, linear_form
from simmerge_ray.operators.specs import parse_arms
from simmerge_ray.plans import MergePlan, ResolvedPlan, pair_plans, resolve_plan, unmerged
from simmerge_ray.progress import Report
from simmerge_ray.storage import versions

_log = logging.getLogger(__name__)
_NUM_CHECK_PROMPTS = 16
_MAX_MODEL_LEN = 4096


@dataclass(frozen=True)
class Trial:
    """A plan, and the tasks whose labels are missing.

    rivals: plans that may turn out to be the same merge, with labels (there, or made by this search) for these tasks.
    """

    resolved: ResolvedPlan
    tasks: tuple[str, ...]
    rivals: tuple[MergePlan, ...] = ()


@dataclass(frozen=True)
class Deferred:
    """A trial was found to be the same merge as one of its rivals, whose labels are not there yet."""

    rival: int


@dataclass(frozen=True)
class Study:
    """What all trials of a search share. An engine is started on `template` and checked by a swap to `other`."""

    trials: tuple[Trial, ...]
    tasks: Mapping[str, Task]
    template: CheckpointRef
    other: CheckpointRef
    settings: EvaluationSettings
    digests: Mapping[str, str]
    labels_uri: str

    def key(self, plan: MergePlan, task: str, base: CheckpointRef | None) -> str:
        """Key of the label of a plan of this search."""
        used = used_digests(plan, self.digests, base.id if base else None)
        return label_key(plan, self.tasks[task].digest, self.settings, used)

    def label(
        self, trial: Trial, task: str, outcome: Outcome, seconds: float, same_as: MergePlan | None = None
    ) -> LabeledPlan:
        """A label with everything that it depends on."""
        plan, base = trial.resolved.plan, trial.resolved.base
        return LabeledPlan(
            plan=plan,
            task=task,
            task_digest=self.tasks[task].digest,
            outcome=outcome,
            settings=self.settings,
            checkpoints=used_digests(plan, self.digests, base.id if base else None),
            seconds=seconds,
            versions=versions(),
            same_as=same_as.label if same_as else None,
        )


class EvaluatorStartError(EngineError):
    """The evaluator did not start, so no trial can be measured: the search ends, and no label is written for it."""


class TrialRunner:
    """Evaluates trials one after the other with one evaluator. Plain class: `MergeTrial` puts it into Ray Tune."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._store = LabelStore(study.labels_uri)
        self._evaluator: Evaluator | None = None

    def run(self, trial: Trial) -> float | Deferred | None:
        """Write the labels, and return the mean utility, or None for an infeasible merge.

        A trial that is the same merge as a rival is not evaluated: its labels are copied, if the rival has them.
        """
        started = time.monotonic()
        if (number := self._same_merge(trial)) is not None:
            copied = copy_labels(self._study, self._store, trial, trial.rivals[number], time.monotonic() - started)
            return Deferred(number) if copied is None else _mean_utility(copied)
        outcomes = self._outcomes(trial)
        seconds = (time.monotonic() - started) / len(trial.tasks)
        self._store.append([self._study.label(trial, task, outcomes[task], seconds) for task in trial.tasks])
        return _mean_utility(outcomes.values())

    def _same_merge(self, trial: Trial) -> int | None:
        """Number of the first rival that makes the same merge."""
        if not trial.rivals:
            return None
        try:
            own = linear_form(trial.resolved)
            for number, rival in enumerate(trial.rivals):
                if own != trial.resolved.plan and linear_form(replace(trial.resolved, plan=rival)).id == own.id:
                    return number
        except CheckpointError:
            pass  # the evaluation will say what is wrong
        return None

    def _outcomes(self, trial: Trial) -> dict[str, Outcome]:
        for attempt in (1, 2):
            evaluator = self._ready_evaluator()
            try:
                evaluator.load(trial.resolved)
                return {name: Measured(self._study.tasks[name].evaluate(evaluator)) for name in trial.tasks}
            except CheckpointError as error:
                return dict.fromkeys(trial.tasks, Infeasible(str(error)))
            except (EngineError, RuntimeError, ValueError) as error:
                _log.exception("attempt %d at %s failed", attempt, trial.resolved.plan.label)
                self._discard_evaluator()
                reason = f"{type(error).__name__}: {error}"
        return dict.fromkeys(trial.tasks, Infeasible(reason))

    def _ready_evaluator(self) -> Evaluator:
        if self._evaluator is None:
            try:
                self._evaluator = start_evaluator(self._study)
            except Exception as error:  # whatever the engine raises: without it no trial can be measured
                _log.exception("the evaluator did not start")
                raise EvaluatorStartError(f"{type(error).__name__}: {error}") from error
        return self._evaluator

    def _discard_evaluator(self) -> None:
        close = getattr(self._evaluator, "close", None)
        self._evaluator = None
        if close:
            close()


def copy_labels(
    study: Study, store: LabelStore, trial: Trial, rival: MergePlan, seconds: float
) -> list[Outcome] | None:
    """Label a trial with the outcomes of a rival that is the same merge; None if one of them is not there yet."""
    known = {label.key: label.outcome for label in store.read()}
    keys = [study.key(rival, task, trial.resolved.base) for task in trial.tasks]
    if any(key not in known for key in keys):
        return None
    outcomes = [known[key] for key in keys]
    share = seconds / len(trial.tasks)
    pairs = zip(trial.tasks, outcomes, strict=True)
    store.append([study.label(trial, task, outcome, share, same_as=rival) for task, outcome in pairs])
    return outcomes


def _mean_utility(outcomes: Iterable[Outcome]) -> float | None:
    utilities = [outcome.utility for outcome in outcomes if isinstance(outcome, Measured)]
    return sum(utilities) / len(utilities) if utilities else None


def start_evaluator(study: Study) -> Evaluator:
    """The evaluator that the settings name; a vLLM engine passes its self-check before it makes a label.

    Raises:
        EngineError: the check failed.
    """
    settings = study.settings
    if settings.evaluator == "transformers":
        from simmerge_ray.transformers_evaluator import TransformersEvaluator

        return TransformersEvaluator(study.template, settings.dtype)
    from simmerge_ray.distributed.vllm_evaluator import VllmEvaluator

    engine = VllmEvaluator(study.template, settings.dtype, settings.max_model_len)
    task = study.tasks[study.trials[0].tasks[0]]
    prompts = encode_prompts(task, task.items[:_NUM_CHECK_PROMPTS], engine.tokenizer)
    engine.check_swap(unmerged(study.other), prompts)
    return engine


class MergeTrial(tune.Trainable):
    """One trial of the search; `config["trial"]` is its index in the study."""

    def setup(self, config: dict[str, Any], study: Study) -> None:
        self._study = study
        self._runner = TrialRunner(study)
        self._index = int(config["trial"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial with the same engine."""
        self._index = int(new_config["trial"])
        return True

    def step(self) -> dict[str, Any]:
        try:
            utility = self._runner.run(self._study.trials[self._index])
        except EvaluatorStartError as error:
            return {"fatal": str(error), "done": True}
        if isinstance(utility, Deferred):
            return {"utility": -1.0, "rival": utility.rival, "done": True}
        return {"utility": -1.0 if utility is None else utility, "infeasible": utility is None, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: labels are the only state."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing."""


@dataclass(frozen=True)
class SearchResult:
    """How a search ended: labels in the store, trials run now, and reasons of the infeasible ones by plan label."""

    store: LabelStore
    num_labels: int
    num_trials_run: int
    infeasible: Mapping[str, str]


# Set by `run_search` for the time of a search: Tune pickles its callbacks, so they cannot hold a progress bar.
_report: Report | None = None


class _ProgressCallback(tune.Callback):
    def __init__(self, total: int) -> None:
        self._done = 0
        self._total = total

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._count()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._count()

    def _count(self) -> None:
        self._done += 1
        if _report:
            _report(self._done, self._total)


class _StopWhenFatal(tune.Stopper):
    """Ends the whole search at the first trial that says no other can succeed."""

    def __init__(self) -> None:
        self._fatal = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self._fatal = self._fatal or "fatal" in result
        return self._fatal

    def stop_all(self) -> bool:
        return self._fatal


def plan_study(
    catalogue: Catalogue,
    tasks: Mapping[str, Task],
    config: SearchConfig,
    labels_uri: str,
    plans: Sequence[MergePlan] | None = None,
) -> Study:
    """All trials whose labels are missing: every checkpoint and the base on every task, then pairs x arms on their
    parents' own tasks. With `plans`: these and their parents, on the parents' own tasks.

    Raises:
        OperatorError, TaskError, PlanError, LabelError: an input that cannot be used, before anything is started.
    """
    arms = parse_arms(config.arms)
    own_tasks = {task for task in catalogue.own_task.values() if task}
    if absent := sorted(own_tasks - set(tasks)):
        raise TaskError(unknown_name("task", absent[0], tasks))
    for pair in config.exclude:
        for checkpoint_id in pair:
            catalogue.ref(checkpoint_id)
    excluded = {frozenset(pair) for pair in config.exclude}
    pairs = [pair for pair in catalogue.pairs(config.pairs) if frozenset(pair) not in excluded]
    if plans is None and not pairs:
        raise LabelError(f"the catalogue has no {config.pairs} pairs; give its checkpoints a 'task', or use pairs: all")
    template = catalogue.base or catalogue.checkpoints[0]
    settings = EvaluationSettings(config.evaluator, config.dtype, _context_limit(template, config.max_model_len))
    digests = catalogue.digests()
    known = LabelStore(labels_uri).keys()
    every_task = tuple(sorted(tasks))
    if plans is None:
        needed = [(MergePlan(source=ref.id), every_task) for ref in catalogue.all_refs]
        needed += [(plan, plan_tasks(plan, catalogue) or every_task) for plan in pair_plans(pairs, arms)]
    else:
        needed = [(plan, plan_tasks(plan, catalogue) or every_task) for plan in plans]
        parents = dict.fromkeys((member, names) for plan, names in needed for member in plan.members)
        needed += [(MergePlan(source=member), names) for member, names in parents]
    base_id = catalogue.base.id if catalogue.base else None
    trials = []
    rivals = _rivals(needed)
    for plan, task_names in needed:
        used = used_digests(plan, digests, base_id)
        missing = tuple(t for t in task_names if label_key(plan, tasks[t].digest, settings, used) not in known)
        if missing:
            trials.append(Trial(resolve_plan(plan, catalogue), missing, rivals.get(plan.id, ())))
    if trials:
        _check_lengths(tasks, template, settings.max_model_len)
    return Study(tuple(trials), dict(tasks), template, catalogue.checkpoints[-1], settings, digests, labels_uri)


def _rivals(needed: Sequence[tuple[MergePlan, Sequence[str]]]) -> dict[str, tuple[MergePlan, ...]]:
    """By the id of a plan with spherical steps: those that it may equal if they fall back, with labels for its tasks.

    Those with fewer spherical steps come first, then those that stand before it, so that no two wait for each other.
    """
    groups: dict[str, list[tuple[int, int, MergePlan, set[str]]]] = {}
    for number, (plan, names) in enumerate(needed):
        if plan.steps:
            spherical = sum(step.arm.operator in SPHERICAL for step in plan.steps)
            groups.setdefault(all_linear(plan).id, []).append((spherical, number, plan, set(names)))
    found = {}
    for group in groups.values():
        group.sort(key=lambda one: one[:2])
        for place, (_, _, plan, tasks) in enumerate(group):
            before = [other for _, _, other, theirs in group[:place] if tasks <= theirs and other.id != plan.id]
            found[plan.id] = tuple(before)
    return found


def _context_limit(template: CheckpointRef, requested: int | None) -> int:
    own = int(read_config(template).get("max_position_embeddings", _MAX_MODEL_LEN))
    if requested is not None and requested > own:
        raise ConfigError(f"max_model_len is {requested}; the checkpoints' own limit is {own} tokens")
    return requested or min(own, _MAX_MODEL_LEN)


def _check_lengths(tasks: Mapping[str, Task], template: CheckpointRef, max_model_len: int) -> None:
    """Refuse an item whose prompt and answer do not fit the engine, before an engine exists."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(template.path, local_files_only=True)
    for name, task in tasks.items():
        num_tokens, number = task.longest(tokenizer)
        if num_tokens > max_model_len:
            raise TaskError(
                f"task {name!r}, item {number}: prompt and answer take {num_tokens} tokens, "
                f"the engine holds {max_model_len} (max_model_len)"
            )


def plan_tasks(plan: MergePlan, catalogue: Catalogue) -> tuple[str, ...]:
    """The own tasks of a plan's members, sorted."""
    return tuple(sorted({task for member in plan.members if (task := catalogue.own_task.get(member))}))


def run_search(
    catalogue: Catalogue,
    tasks: Mapping[str, Task],
    config: SearchConfig,
    labels_uri: str | Path,
    plans: Sequence[MergePlan] | None = None,
    report: Report | None = None,
) -> SearchResult:
    """Measure what is missing from the label store. Starts Ray only if something is.

    Raises:
        InputError: see `plan_study`.
    """
    global _report
    store = LabelStore(labels_uri)
    study = plan_study(catalogue, tasks, config, store.uri, plans)
    if study.trials:
        _report = report
        try:
            with ray_session():
                _run_trials(study, config.concurrency)
        finally:
            _report = None
    labels = store.read()
    infeasible = {
        f"{label.plan.label} on {label.task}": label.outcome.reason
        for label in labels
        if isinstance(label.outcome, Infeasible)
    }
    return SearchResult(store, len(labels), len(study.trials), infeasible)


def _run_trials(study: Study, concurrency: int) -> None:
    concurrency = min(concurrency, int(ray.cluster_resources().get("CPU", 1)), len(study.trials))
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    with tempfile.TemporaryDirectory(prefix="simmerge-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(MergeTrial, study=study), {"cpu": 1}),
            param_space={"trial": tune.grid_search(list(range(len(study.trials))))},
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=concurrency),
            run_config=tune.RunConfig(
                name="search",
                storage_path=scratch,
                verbose=0,
                stop=_StopWhenFatal(),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=2),
                callbacks=[_ProgressCallback(len(study.trials))],
            ),
        )
        grid = tuner.fit()
    store = LabelStore(study.labels_uri)
    deferred = {}
    for result in grid:
        if fatal := (result.metrics or {}).get("fatal"):
            raise EvaluatorStartError(f"the {study.settings.evaluator} evaluator did not start: {fatal}")
    for result in grid:
        if result.error is not None:
            if "RuntimeEnvSetupError" in f"{type(result.error).__name__} {result.error}":
                # The cluster's fault, not the merge's: no label, the next run tries again.
                raise EngineError(f"the cluster could not set up a trial's actor: {_last_line(result.error)}")
            trial = study.trials[int(result.config["trial"])]
            reason = f"the trial's actor failed three times: {_last_line(result.error)}"
            store.append([study.label(trial, task, Infeasible(reason), 0.0) for task in trial.tasks])
        elif (rival := (result.metrics or {}).get("rival")) is not None:
            deferred[int(result.config["trial"])] = int(rival)
    for number, rival in sorted(deferred.items(), key=lambda one: (one[1], one[0])):
        copy_labels(study, store, study.trials[number], study.trials[number].rivals[rival], 0.0)


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]
