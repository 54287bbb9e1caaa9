"""The first stage of the plan scorer: every plan of a space, or a beam of it, on `second_order` features.

Plans are arrays. A prefix is a fold of d checkpoints with the barycentric weights of its result; a step takes all
prefixes and all checkpoints at once, and the model is asked once for each depth, in blocks for memory and for threads.
Its answer for (prefix, right) holds the utilities of all arms of that step.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from simmerge_ray.plans.plan import MergePlan, fold_plan
from simmerge_ray.selector.planning.space import PlanSpace
from simmerge_ray.selector.planning.tasks import TaskPool
from simmerge_ray.signals.features import both_orders
from simmerge_ray.signals.propagation.batch import SecondOrderBatch

AGGREGATES = ("last", "mean", "sum")
_BLOCK_ROWS = 4096  # rows of features in one call of the model: some MB, so that they stay in the cache
_DIGITS = 12  # predictions that differ by less are equal, whatever the order of summation was


class Model(Protocol):
    """The part of a selector that the scorer needs."""

    @property
    def arms(self) -> tuple[str, ...]: ...

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def best_fixed(self) -> str: ...

    @property
    def label_error(self) -> float: ...

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, 2, F) scaled features of both orders -> utility (N, K), sd (N, K)."""
        ...


@dataclass(frozen=True)
class Shortlist:
    """Plans from best to worst by the first stage. num_scored: of the whole search. width: of the beam, if any."""

    plans: tuple[MergePlan, ...]
    scores: np.ndarray
    num_scored: int
    width: int | None


@dataclass(frozen=True)
class _Prefixes:
    """P folds of d checkpoints. members: (P, d) int. arms: (P, d - 1) int. weights: (P, K). steps: (2, P, T), utility
    and sd summed over the steps."""

    members: np.ndarray
    arms: np.ndarray
    weights: np.ndarray
    steps: np.ndarray

    def part(self, rows: slice) -> _Prefixes:
        return _Prefixes(self.members[rows], self.arms[rows], self.weights[rows], self.steps[:, rows])


@dataclass(frozen=True)
class _Made:
    """M plans made by one step: prefix, right, arm (M,) int; score (M,); steps (2, M, T); complete (M,) bool."""

    prefix: np.ndarray
    right: np.ndarray
    arm: np.ndarray
    score: np.ndarray
    steps: np.ndarray
    complete: np.ndarray

    def part(self, rows: np.ndarray) -> _Made:
        return _Made(
            self.prefix[rows], self.right[rows], self.arm[rows], self.score[rows], self.steps[:, rows],
            self.complete[rows],
        )  # fmt: skip


def best_first(scores: np.ndarray) -> np.ndarray:
    """Indices from the highest score to the lowest; equal ones in their order."""
    return np.argsort(-np.round(scores, _DIGITS), kind="stable")


def aggregated(steps: np.ndarray, num_steps: int, aggregate: str) -> np.ndarray:
    """What counts of the sums over steps: the last step alone (then they hold nothing else), the sum or the mean."""
    return steps / num_steps if aggregate == "mean" else steps


class PlanSearch:
    """Scores the plans of one space, by the prediction in [0, 1] less `caution` times its spread.

    The model knows columns that the batch delivers.
    """

    def __init__(
        self,
        batch: SecondOrderBatch,
        model: Model,
        space: PlanSpace,
        pool: TaskPool,
        aggregate: str = "last",
        caution: float = 0.0,
        num_threads: int | None = None,
    ) -> None:
        self._batch, self._model, self._space, self._pool, self._aggregate = batch, model, space, pool, aggregate
        self._caution, self._num_threads = caution, num_threads or min(4, os.cpu_count() or 1)
        self._arms = [model.arms.index(arm.label) for arm in space.arms]
        self._symmetric = np.array([arm.spec.symmetric for arm in space.arms])
        self._candidate = np.isin(batch.ids, space.ids)
        self._required = np.isin(batch.ids, sorted(space.required))

    def run(self, width: int | None, size: int) -> Shortlist:
        """The best plans. width: prefixes that go on at each depth; None takes all of them. size: of the shortlist."""
        low, high = self._space.ways
        start = np.flatnonzero(self._candidate)
        frontier = _Prefixes(
            start[:, None],
            np.zeros((len(start), 0), np.int64),
            self._batch.checkpoints()[start],
            np.zeros((2, len(start), len(self._pool.tasks))),
        )
        scores, plans, num_scored = np.zeros(0), [], 0
        for number in range(1, high):
            goes_on = number + 1 < high
            # Of the plans of a block no more than these can be among the best of all.
            most = None if goes_on and width is None else max(size, width or 0 if goes_on else 0)
            made, count = self._step(frontier, number, most)
            if number + 1 >= low:
                whole = np.flatnonzero(made.complete)
                num_scored += count
                best = whole[best_first(made.score[whole])[:size]]
                scores = np.concatenate((scores, made.score[best]))
                plans += [self._plan(frontier, made, index) for index in best]
            if goes_on:
                frontier = self._next(frontier, made, number, width)
        order = best_first(scores)[:size]
        return Shortlist(tuple(plans[index] for index in order), scores[order], num_scored, width)

    def _step(self, frontier: _Prefixes, number: int, most: int | None) -> tuple[_Made, int]:
        """The plans of one more checkpoint, or so many of the best and of the best that are complete, and how many are
        complete."""
        rows = max(1, _BLOCK_ROWS // len(self._batch.ids))
        starts = range(0, len(frontier.members), rows)
        expand = partial(self._expand, frontier, number, rows)

        def kept(start: int) -> tuple[_Made, int]:
            made = expand(start)
            count = int(made.complete.sum())
            if most is None or len(made.score) <= most:
                return made, count
            order = best_first(made.score)
            best = np.union1d(order[:most], order[made.complete[order]][:most])
            return made.part(best), count

        with ThreadPoolExecutor(self._num_threads) as pool:
            found = list(pool.map(kept, starts))
        blocks = [made for made, _ in found]
        columns = {name: [getattr(block, name) for block in blocks] for name in vars(blocks[0])}
        joined = {name: np.concatenate(parts, axis=int(name == "steps")) for name, parts in columns.items()}
        return _Made(**joined), sum(count for _, count in found)

    def _expand(self, frontier: _Prefixes, number: int, rows: int, start: int) -> _Made:
        """The prefixes from `start` on with every checkpoint and every arm, those that may be."""
        prefixes, high = frontier.part(slice(start, start + rows)), self._space.ways[1]
        size, num = len(prefixes.members), len(self._batch.ids)
        allowed: np.ndarray = np.repeat(self._candidate[None], size, axis=0)
        np.put_along_axis(allowed, prefixes.members, False, axis=1)
        missing = self._required.sum() - self._required[prefixes.members].sum(1)[:, None] - self._required[None]
        allowed &= missing <= high - number - 1
        valid = np.repeat(allowed[..., None], len(self._arms), axis=2)
        if number == 1:
            valid &= ~self._symmetric | (np.arange(num)[None] > prefixes.members)[..., None]
            allowed &= valid.any(2)
        both = np.concatenate(
            (np.repeat(prefixes.members[:, None], num, 1), np.tile(np.arange(num)[:, None], (size, 1, 1))), axis=2
        )
        counted = self._pool.counted(both)
        utilities = self._utilities(prefixes, number, allowed, counted)  # (2, p, n, T, A)
        row, right, arm = np.nonzero(valid)
        steps = utilities[:, row, right, :, arm].transpose(1, 0, 2)
        if self._aggregate != "last":
            steps = steps + prefixes.steps[:, row]
        mean, sd = aggregated(steps, number, self._aggregate)
        score, spread = self._pool.pooled(mean, sd, counted[row, right])
        return _Made(row + start, right, arm, score - self._caution * spread, steps, missing[row, right] <= 0)

    def _utilities(self, prefixes: _Prefixes, number: int, allowed: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """Utility and sd of steps (prefix, right) on the tasks that count, by arm; (2, p, n, T, A), else 0."""
        found = np.zeros((2, *allowed.shape, len(self._pool.tasks), len(self._arms)))
        for place, task in enumerate(self._pool.tasks):
            asked = allowed & counted[..., place] if self._aggregate == "last" else allowed
            if not asked.any():
                continue
            columns = self._model.columns
            values = (
                self._batch.pairs(prefixes.members[:, 0], task, columns)
                if number == 1
                else self._batch.features(prefixes.weights, task, columns)
            )
            predicted = self._model.predict(both_orders(values[:, asked], columns))
            found[0, asked, place] = predicted[0][:, self._arms].clip(0.0, 1.0)
            found[1, asked, place] = predicted[1][:, self._arms]
        return found

    def _next(self, frontier: _Prefixes, made: _Made, number: int, width: int | None) -> _Prefixes:
        """The best plans as prefixes of longer ones."""
        kept = np.arange(len(made.score)) if width is None else np.sort(best_first(made.score)[:width])
        prefix, right, arm = made.prefix[kept], made.right[kept], made.arm[kept]
        weights = np.empty((len(kept), frontier.weights.shape[1]))
        for place, one in enumerate(self._space.arms):
            of_arm = np.flatnonzero(arm == place)
            weights[of_arm] = self._batch.merged(
                frontier.weights[prefix[of_arm]], right[of_arm], one, self._space.step_weight(number)
            )
        members = np.concatenate((frontier.members[prefix], right[:, None]), axis=1)
        arms = np.concatenate((frontier.arms[prefix], arm[:, None]), axis=1)
        return _Prefixes(members, arms, weights, made.steps[:, kept])

    def _plan(self, frontier: _Prefixes, made: _Made, index: int) -> MergePlan:
        prefix = made.prefix[index]
        members = [self._batch.ids[i] for i in (*frontier.members[prefix], made.right[index])]
        arms = [self._space.arms[i] for i in (*frontier.arms[prefix], made.arm[index])]
        return fold_plan(members, arms, self._space.weighting)
