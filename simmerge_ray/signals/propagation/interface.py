"""What a propagator is, and the intermediates of a plan."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from simmerge_ray.base.errors import OperatorError, PlanError
from simmerge_ray.plans.operators.specs import Arm, Weight
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.signals.pair_blocks import PairSignals
from simmerge_ray.signals.table import SignalTable

NAMES = ("bound", "second_order", "virtual", "curved", "exact")  # of `table.PROPAGATORS`, without its imports
_NO_GRADIENTS = "a weight that changes with depth cannot be propagated; give one number, or take propagator 'exact'"


@dataclass(frozen=True)
class PlanStep:
    """One step of a plan, on one task. number: of the step, from 0."""

    plan: MergePlan
    number: int
    task: str


@dataclass(frozen=True)
class Intermediate:
    """A step with all the steps under it: the same in every plan that merges so, whatever its number there.

    step, seed: number of the step and seed of the plan where the operator is random, else 0.
    """

    arm: Arm
    weight: Weight
    left: Source
    right: Source
    step: int = 0
    seed: int = 0

    @property
    def constant_weight(self) -> float:
        """The weight, for propagators that know numbers only. Raises PlanError where it changes with depth."""
        if isinstance(self.weight, tuple):
            raise PlanError(_NO_GRADIENTS)
        return self.weight

    def __hash__(self) -> int:
        return self._hash  # of the whole fold, so it is computed once

    @cached_property
    def _hash(self) -> int:
        return hash((self.arm, self.weight, self.left, self.right, self.step, self.seed))


Source = str | Intermediate


@lru_cache(1024)
def plan_results(plan: MergePlan) -> tuple[Intermediate, ...]:
    """The result of every step; commuting sources are sorted, so that plans share it."""
    results: list[Intermediate] = []
    for number, step in enumerate(plan.steps, 1):
        left, right = (_resolved(source, results) for source in (step.left, step.right))
        random = step.arm.spec.random
        if step.arm.spec.symmetric and step.weight == 0.5 and _order(right) < _order(left):
            left, right = right, left
        results.append(
            Intermediate(step.arm, step.weight, left, right, number if random else 0, plan.seed if random else 0)
        )
    return tuple(results)


def plan_sources(plan: MergePlan) -> list[tuple[Source, Source]]:
    """(left, right) of every step."""
    results = plan_results(plan)
    return [(_resolved(step.left, results), _resolved(step.right, results)) for step in plan.steps]


def _resolved(source: str, results: Sequence[Intermediate]) -> Source:
    return results[int(source[1:]) - 1] if source.startswith("#") else source


def _order(source: Source) -> tuple[bool, str]:
    return isinstance(source, Intermediate), str(source)


def members(source: Source) -> tuple[str, ...]:
    """Ids of the checkpoints under a source, sorted."""
    if isinstance(source, str):
        return (source,)
    return tuple(sorted({*members(source.left), *members(source.right)}))


def fold_path(source: Source) -> tuple[str, ...]:
    """A key that sorts sources so that those which begin alike stand together."""
    if isinstance(source, str):
        return (source,)
    right = "\0".join(fold_path(source.right))
    return (*fold_path(source.left), f"{right}\0{source.arm.label}\0{source.weight}\0{source.step}\0{source.seed}")


@dataclass(frozen=True)
class SourcePair:
    """Left and right of a step, on one task. plan: one that has the step."""

    left: Source
    right: Source
    task: str
    plan: MergePlan = field(compare=False)


class Propagator:
    """Signals of the steps of any plan: folds and DAGs of two-way steps, every operator that a step can have.

    A step of two checkpoints has the table's own values; a propagator says what those of other sources are.

    columns: the feature columns that it delivers, in the order of `feature_columns`. gradients: whether it knows steps
    whose weight changes with depth.
    """

    name: str

    def __init__(self, table: SignalTable, columns: tuple[str, ...], gradients: bool = False) -> None:
        self._table, self.columns, self._gradients = table, columns, gradients

    def _features(self, pairs: Sequence[SourcePair], columns: Sequence[str], num_threads: int) -> np.ndarray:
        """(F, N) of different pairs; those with the same left source stand together."""
        raise NotImplementedError

    def among(self, ids: Collection[str]) -> Propagator:
        """One that may know these checkpoints alone, where that is cheaper than to know all of them."""
        return self

    def steps(self, plan: MergePlan, task: str, first: int = 0) -> list[PairSignals]:
        """Signals of (left, right) of every step, in order; sources are named as in the plan, `#n` for results.

        The first so many steps are left out (-1: all but the last step).

        Raises:
            PlanError: a checkpoint or the task is not in the table, or a weight changes with depth (which `exact`
                takes). OperatorError: an operator needs a base and the table has none; see also the operator.
        """
        steps = [PlanStep(plan, number, task) for number in range(len(plan.steps))][first:]
        values = self.batch(steps, self.columns, 1).T.tolist()
        return [
            PairSignals(step.left, step.right, task, dict(zip(self.columns, row, strict=True)))
            for step, row in zip(plan.steps[first:], values, strict=True)
        ]

    def batch(self, steps: Sequence[PlanStep], columns: Sequence[str], num_threads: int) -> np.ndarray:
        """Some of its columns for many steps at once, of any plans and tasks, (F, N): the numbers of `steps`."""
        for plan, task in dict.fromkeys((step.plan, step.task) for step in steps):
            check_plan(plan, task, self._table, self._gradients)
        values = np.empty((len(columns), len(steps)))
        places: dict[SourcePair, list[int]] = {}
        known: dict[str, list[tuple[int, tuple[str, str]]]] = {}
        for place, step in enumerate(steps):
            left, right = plan_sources(step.plan)[step.number]
            if isinstance(left, str) and isinstance(right, str):
                known.setdefault(step.task, []).append((place, (left, right)))
            else:
                places.setdefault(SourcePair(left, right, step.task, step.plan), []).append(place)
        for task, found in known.items():
            values[:, [place for place, _ in found]] = self._table.values_of([pair for _, pair in found], task, columns)
        if places:
            pairs = sorted(places, key=lambda pair: fold_path(pair.left))
            features = self._features(pairs, columns, num_threads)
            for index, pair in enumerate(pairs):
                values[:, places[pair]] = features[:, [index]]
        return values


def check_plan(plan: MergePlan, task: str, table: SignalTable, gradients: bool = False) -> None:
    """Refuse what a propagator cannot know; see `Propagator.steps`."""
    table.check(plan.members, task)
    if plan.needs_base and table.provenance.get("base") is None:
        names = sorted({step.arm.operator for step in plan.steps if step.arm.spec.needs_base})
        raise OperatorError(f"operator {', '.join(names)} needs a base checkpoint; the signal table was made without")
    for number, step in enumerate(plan.steps, 1):
        if isinstance(step.weight, tuple) and not gradients:
            raise PlanError(f"step {number}: {_NO_GRADIENTS}")
