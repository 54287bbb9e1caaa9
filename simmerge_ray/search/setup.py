"""What a search measures: the merges, the tasks, the settings, and which labels are missing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.errors import ConfigError, InputError, LabelError, TaskError, problem_list, unknown_name
from simmerge_ray.base.storage import versions
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.digests import cached_digest
from simmerge_ray.checkpoints.references import CheckpointRef, context_limit
from simmerge_ray.checkpoints.tokenizers import load_tokenizer
from simmerge_ray.merging.engine.fallbacks import all_linear
from simmerge_ray.plans.operators.specs import parse_arms
from simmerge_ray.plans.plan import MergePlan, pair_plans, plan_from_json, resolve_plan
from simmerge_ray.search.evaluation import EvaluationTask
from simmerge_ray.search.evaluation.answers import AnswersTask
from simmerge_ray.search.labels import (
    EvaluationSettings,
    Infeasible,
    LabeledPlan,
    LabelStore,
    Measured,
    Outcome,
    label_key,
    used_digests,
)
from simmerge_ray.search.objectives import Objective, parse_objective
from simmerge_ray.search.space import SearchSpace, make_space

_MAX_MODEL_LEN = 4096
Value = TypeVar("Value")

GivenPlans = Sequence[MergePlan] | Mapping[MergePlan, Sequence[str]]
"""What a search is told to measure: on the plans' own tasks, or on those that stand beside each."""


@dataclass(frozen=True)
class Trial:
    """A plan, and the tasks whose labels are missing.

    rivals: plans that may turn out to be the same merge, with labels (there, or made by this search) for these tasks.
    num_shards: parts of the items after each of which the trial may be stopped.
    """

    plan: MergePlan
    tasks: tuple[str, ...]
    rivals: tuple[MergePlan, ...] = ()
    num_shards: int = 1

    def to_text(self) -> str:
        """JSON text that `from_text` reads: a trial on its way to an actor."""
        rivals = [rival.to_json() for rival in self.rivals]
        return json.dumps([self.plan.to_json(), self.tasks, rivals, self.num_shards])

    @staticmethod
    def from_text(text: str) -> Trial:
        plan, tasks, rivals, num_shards = json.loads(text)
        return Trial(plan_from_json(plan), tuple(tasks), tuple(plan_from_json(one) for one in rivals), num_shards)


@dataclass(frozen=True)
class PreparedSearch:
    """What all trials of a search share; small enough to send to every actor.

    answers: of each owner, by its id, asked of a merge beside its tasks: what a merge keeps of its members. They are
    written like labels, and count for no objective.
    """

    catalogue: Catalogue
    tasks: Mapping[str, EvaluationTask]
    config: SearchConfig
    settings: EvaluationSettings
    digests: Mapping[str, str]
    labels_uri: str
    objectives: tuple[Objective, ...]
    space: SearchSpace | None = None
    answers: Mapping[str, Sequence[AnswersTask]] = field(default_factory=dict)

    @property
    def template(self) -> CheckpointRef:
        """An engine is started on this checkpoint, and checked by a swap to `other`."""
        return self.catalogue.all_refs[0]

    @property
    def other(self) -> CheckpointRef:
        return self.catalogue.checkpoints[-1]

    def task(self, name: str) -> EvaluationTask:
        """A task, or answers, by its name."""
        if name in self.tasks:
            return self.tasks[name]
        return next(one for answers in self.answers.values() for one in answers if one.name == name)

    def key(self, plan: MergePlan, task: str) -> str:
        """Key of the label of a plan."""
        return label_key(plan, self.task(task).digest, self.settings, self._used(plan))

    def label(
        self, plan: MergePlan, task: str, outcome: Outcome, seconds: float, same_as: MergePlan | None = None
    ) -> LabeledPlan:
        """A label with everything that it depends on."""
        return LabeledPlan(
            plan=plan,
            task=task,
            task_digest=self.task(task).digest,
            outcome=outcome,
            settings=self.settings,
            checkpoints=self._used(plan),
            seconds=seconds,
            versions=versions(),
            same_as=same_as.label if same_as else None,
        )

    def _used(self, plan: MergePlan) -> dict[str, str]:
        used = used_digests(plan, self.digests, self.catalogue.base.id if self.catalogue.base else None)
        if not plan.needs_grams:
            return used
        grams = [gram for member in plan.members if (gram := self.catalogue.ref(member).gram_ref)]
        return used | {gram.id: cached_digest(gram) for gram in grams}

    def labels(self) -> dict[MergePlan, dict[str, LabeledPlan]]:
        """The labels in the store that this search would make itself (same contents, items and settings), by plan and
        task; of plans with one id, in whatever words each label has it, the first stands for all. Tasks with the same
        items share a label, whatever their names."""
        known = {ref.id for ref in self.catalogue.all_refs}
        found: dict[MergePlan, dict[str, LabeledPlan]] = {}
        first: dict[str, MergePlan] = {}
        names: dict[str, list[str]] = {}
        for name, task in self.tasks.items():
            names.setdefault(task.digest, []).append(name)
        for label in LabelStore(self.labels_uri).read():
            ours = names.get(label.task_digest, []) if set(label.plan.members) <= known else []
            if ours and self.key(label.plan, ours[0]) == label.key:
                of_plan = found.setdefault(first.setdefault(label.plan.id, label.plan), {})
                of_plan |= {name: replace(label, task=name) for name in ours}
        return found

    def values(self, utilities: Mapping[str, float]) -> tuple[float, ...]:
        """Values of the objectives; in a grid, where a merge has its members' tasks only, the mean of those. NaN while
        none of them is known (answers are no tasks)."""
        utilities = {name: utility for name, utility in utilities.items() if name in self.tasks}
        if not utilities:
            return (math.nan,) * max(1, len(self.objectives))
        if self.space is None:
            return (sum(utilities.values()) / len(utilities),)
        return tuple(objective.value(utilities) for objective in self.objectives)

    def tasks_of(self, plan: MergePlan) -> tuple[str, ...]:
        """The tasks that a plan is evaluated on: its members' own tasks, all tasks for a checkpoint as it is and for
        members without one; in a search for the best merge those of its objectives."""
        every = tuple(sorted(self.tasks))
        if self.space is not None:
            return tuple(sorted({task for objective in self.objectives for task in objective.tasks or every}))
        own = {task for member in plan.members if (task := self.catalogue.own_task.get(member))}
        return tuple(sorted(own)) if own and plan.source is None else every

    def asked_of(self, plan: MergePlan) -> tuple[str, ...]:
        """Its tasks, then the answers of its members; of a checkpoint as it is the answers of all owners."""
        owners = self.answers if plan.source is not None else plan.members
        answers = (one.name for owner in owners for one in self.answers.get(owner, ()))
        return (*self.tasks_of(plan), *sorted(answers))


def prepare_search(
    catalogue: Catalogue,
    tasks: Mapping[str, EvaluationTask],
    config: SearchConfig,
    labels_uri: str,
    plans_given: bool = False,
    answers: Mapping[str, Sequence[AnswersTask]] | None = None,
) -> PreparedSearch:
    """Check everything that can be checked before an engine exists.

    Args:
        plans_given: what is measured does not come from the catalogue's pairs, so that it needs none.
        answers: see `PreparedSearch`.

    Raises:
        InputError: an input that cannot be used; several are listed in one `ConfigError`.
    """
    problems: list[str] = []
    context = _collected(problems, lambda: _context_limit(catalogue, config.max_model_len))
    objectives = _collected(problems, lambda: [parse_objective(text, tasks) for text in config.objectives])
    _collected(problems, lambda: parse_arms(config.arms))
    space = None
    if config.budget is not None:
        space = _collected(problems, lambda: make_space(catalogue, config))
    elif not plans_given:
        _collected(problems, lambda: _check_pairs(catalogue, tasks, config))
    if context is not None:
        asked = {one.name: one for some in (answers or {}).values() for one in some}
        _collected(problems, lambda: check_lengths({**tasks, **asked}, catalogue, context))
    if problems:
        raise ConfigError(problem_list("", problems))
    assert context is not None and objectives is not None
    settings = EvaluationSettings(config.evaluator, config.dtype, context)
    digests = catalogue.digests()
    return PreparedSearch(
        catalogue, dict(tasks), config, settings, digests, labels_uri, tuple(objectives), space, dict(answers or {})
    )


def _collected(problems: list[str], check: Callable[[], Value]) -> Value | None:
    try:
        return check()
    except InputError as error:
        problems.append(str(error))
        return None


def _check_pairs(catalogue: Catalogue, tasks: Mapping[str, EvaluationTask], config: SearchConfig) -> None:
    own_tasks = {task for task in catalogue.own_task.values() if task}
    if absent := sorted(own_tasks - set(tasks)):
        raise TaskError(unknown_name("task", absent[0], tasks))
    for pair in config.exclude:
        for checkpoint_id in pair:
            catalogue.ref(checkpoint_id)
    if not _pairs(catalogue, config):
        raise LabelError(f"the catalogue has no {config.pairs} pairs; give its checkpoints a 'task', or use pairs: all")


def _pairs(catalogue: Catalogue, config: SearchConfig) -> list[tuple[str, str]]:
    excluded = {frozenset(pair) for pair in config.exclude}
    return [pair for pair in catalogue.pairs(config.pairs) if frozenset(pair) not in excluded]


def grid_trials(search: PreparedSearch, plans: GivenPlans | None = None) -> list[Trial]:
    """The trials whose labels are missing: every checkpoint and the base on every task, then pairs x arms on their
    parents' own tasks. With `plans`: these and their parents, on the plans' tasks; where these are answers of members
    (`AnswersTask`), a parent is run over them only as a plan of its own.

    Raises:
        OperatorError, PlanError: a plan that the catalogue cannot make.
    """
    catalogue, config = search.catalogue, search.config
    if plans is None:
        singles = [MergePlan(source=ref.id) for ref in catalogue.all_refs]
        merges = pair_plans(_pairs(catalogue, config), parse_arms(config.arms))
        needed = [(plan, search.asked_of(plan)) for plan in (*singles, *merges)]
    else:
        names_of = plans if isinstance(plans, Mapping) else {plan: search.asked_of(plan) for plan in plans}
        asked = {plan: dict.fromkeys(names) for plan, names in names_of.items()}
        for plan, names in names_of.items():
            compared = dict.fromkeys(name for name in names if not isinstance(search.task(name), AnswersTask))
            for member in plan.members if compared else ():
                asked.setdefault(MergePlan(source=member), {}).update(compared)
        needed = [(plan, tuple(names)) for plan, names in asked.items()]
    for plan, _ in needed:
        resolve_plan(plan, catalogue)
    rivals = _rivals(needed)
    final = Measured if config.retry_infeasible else (Measured, Infeasible)
    known = {label.key for label in LabelStore(search.labels_uri).read() if isinstance(label.outcome, final)}
    missing = [(plan, tuple(task for task in names if search.key(plan, task) not in known)) for plan, names in needed]
    return [Trial(plan, tasks, rivals.get(plan.id, ())) for plan, tasks in missing if tasks]


def _rivals(needed: Sequence[tuple[MergePlan, Sequence[str]]]) -> dict[str, tuple[MergePlan, ...]]:
    """By the id of a plan with spherical steps: those that it may equal if they fall back, with labels for its tasks.

    Those with fewer spherical steps come first, then those that stand before it, so that no two wait for each other.
    """
    groups: dict[str, list[tuple[int, int, MergePlan, set[str]]]] = {}
    for number, (plan, names) in enumerate(needed):
        if plan.is_merge:
            spherical = sum(arm.spec.is_spherical for arm in plan.arms)
            groups.setdefault(all_linear(plan).id, []).append((spherical, number, plan, set(names)))
    found = {}
    for group in groups.values():
        group.sort(key=lambda one: one[:2])
        for place, (_, _, plan, tasks) in enumerate(group):
            before = (other for _, _, other, theirs in group[:place] if tasks <= theirs and other.id != plan.id)
            found[plan.id] = tuple(before)
    return found


def _context_limit(catalogue: Catalogue, requested: int | None) -> int:
    own = context_limit(catalogue.all_refs[0]) or _MAX_MODEL_LEN
    if requested is not None and requested > own:
        raise ConfigError(f"max_model_len is {requested}; the checkpoints' own limit is {own} tokens")
    return requested or min(own, _MAX_MODEL_LEN)


def check_lengths(tasks: Mapping[str, EvaluationTask], catalogue: Catalogue, max_model_len: int) -> None:
    """Refuse tasks with items that do not fit an engine. Raises TaskError: with the longest item of every such task."""
    are_tokens = all(isinstance(task, AnswersTask) for task in tasks.values())
    tokenizer = None if are_tokens else load_tokenizer(catalogue.all_refs[0])
    problems = []
    for name, task in tasks.items():
        try:
            num_tokens, number = task.longest(tokenizer)
        except TaskError as error:
            problems.append(str(error))
            continue
        if num_tokens > max_model_len:
            problems.append(
                f"task {name!r}, item {number}: prompt and answer take {num_tokens} tokens, "
                f"the engine holds {max_model_len} (max_model_len)"
            )
    if problems:
        raise TaskError(problem_list("", problems))
