"""How good are choices of arms? GapClosed, regret and picks within the noise set of any policy, on the same contexts.

A policy is an array of *shares* (N, A): how often it takes each option for a context. Options are the arms and, for the
policy that does not merge, the two parents. One rule makes shares of scores (N, A): the best score of the context, or
of all contexts of the pair together where one arm serves the whole merge; ties are split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from simmerge_ray.search.headroom import NUM_STANDARD_ERRORS, Context, defined_gaps
from simmerge_ray.selector.data.splits import Pair, pairs_of

PARENTS = ("parent:left", "parent:right")
GAP_CLOSED, UTILITY = "GapClosed", "utility"


@dataclass(frozen=True)
class Scoring:
    """Numerators and denominators of GapClosed of the D contexts where it is defined, for A options.

    rows: (D,) of the dataset. tasks: (D,). closed: (D, A). gap: (D,). unit: `GapClosed`, or `utility` where that is
    nowhere defined: then closed is the utility itself, gap is 1, and all contexts count.
    """

    rows: np.ndarray
    tasks: np.ndarray
    closed: np.ndarray
    gap: np.ndarray
    unit: str

    @staticmethod
    def of(contexts: Sequence[Context], arms: Sequence[str]) -> Scoring:
        """Of all contexts, options being the arms and both parents."""
        gaps = defined_gaps([_with_parents(context) for context in contexts], (*arms, *PARENTS))
        if len(gaps.rows):
            return Scoring(gaps.rows, np.array(gaps.tasks), gaps.closed, gaps.gap, GAP_CLOSED)
        tasks = np.array([context.task for context in contexts])
        return Scoring(
            np.arange(len(contexts)), tasks, option_utilities(contexts, arms), np.ones(len(contexts)), UTILITY
        )

    def among(self, rows: Sequence[int]) -> Scoring:
        """The part that lies in the given rows; they keep their numbers."""
        kept = np.isin(self.rows, np.asarray(rows, dtype=np.int64))
        return Scoring(self.rows[kept], self.tasks[kept], self.closed[kept], self.gap[kept], self.unit)

    def headline(self, numerators: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """(..., D) numerators -> (...): ratio of sums per task, then the mean over the tasks that have weight.

        weights: (..., D), how often each context counts; NaN where none does.
        """
        counts = np.ones(len(self.rows)) if weights is None else weights
        ratios = []
        for task in np.unique(self.tasks):
            of_task = self.tasks == task
            total = (counts * self.gap)[..., of_task].sum(-1)
            closed = (counts * numerators)[..., of_task].sum(-1)
            ratios.append(np.divide(closed, total, out=np.full(np.shape(closed), np.nan), where=total > 0))
        if not ratios:
            return np.full(np.broadcast_shapes(numerators.shape, counts.shape)[:-1], np.nan)
        return _mean_of_known(ratios)

    def fixed(self) -> np.ndarray:
        """(A,): the headline of each option taken everywhere; NaN where no context is left."""
        return self.headline(self.closed.T)

    def best_fixed(self, num_arms: int) -> int:
        """Of the arms, the first `num_arms` options, the one with the best headline; the first if there is none."""
        headline = self.fixed()[:num_arms]
        return 0 if np.isnan(headline).all() else int(np.nanargmax(headline))

    def taken(self, shares: np.ndarray) -> np.ndarray:
        """(N, A) shares -> (D,) numerators."""
        return (shares[self.rows] * self.closed).sum(1)


def _mean_of_known(ratios: Sequence[np.ndarray]) -> np.ndarray:
    known = ~np.isnan(ratios)
    mean = np.where(known, ratios, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    return np.where(known.any(0), mean, np.nan)


def _with_parents(context: Context) -> Context:
    parents = dict(zip(PARENTS, (context.left_items, context.right_items), strict=True))
    return replace(context, arms={**context.arms, **parents})


def option_utilities(contexts: Sequence[Context], arms: Sequence[str]) -> np.ndarray:
    """(N, K + 2): mean utility of each arm and of both parents."""
    return np.array(
        [
            [*(context.arms[arm].mean() for arm in arms), context.left_items.mean(), context.right_items.mean()]
            for context in contexts
        ]
    )


def keeping_no_parent(scores: np.ndarray) -> np.ndarray:
    """(N, K) -> (N, K + 2): scores of the arms alone, a parent is never chosen; rows without scores stay NaN."""
    none = np.where(np.isnan(scores).any(1, keepdims=True), np.nan, -np.inf)
    return np.hstack([scores, none, none])


def units_of(contexts: Sequence[Context], per_merge: bool) -> list[list[int]]:
    """Rows that share one choice: those of a pair, or each row alone."""
    if not per_merge:
        return [[row] for row in range(len(contexts))]
    found: dict[Pair, list[int]] = {}
    for row, (left, right) in enumerate(pairs_of(contexts)):
        found.setdefault((min(left, right), max(left, right)), []).append(row)
    return list(found.values())


def shares_of(scores: np.ndarray, units: Sequence[Sequence[int]]) -> np.ndarray:
    """(N, A) scores -> (N, A) shares: the best mean score of the unit, ties split; rows without scores are NaN."""
    shares = np.full(scores.shape, np.nan)
    for rows in units:
        known = [row for row in rows if not np.isnan(scores[row]).any()]
        if known:
            mean = scores[known].mean(0)
            best = mean >= mean.max() - 1e-12
            shares[known] = best / best.sum()
    return shares


@dataclass(frozen=True)
class NoiseSets:
    """Per unit (U, A): mean utility of the options, and whether one is not significantly worse than the best arm.

    Significantly: by two standard errors of the differences on the same items, averaged over the unit's tasks.
    """

    utilities: np.ndarray
    within: np.ndarray
    num_arms: int

    @staticmethod
    def of(contexts: Sequence[Context], arms: Sequence[str], units: Sequence[Sequence[int]]) -> NoiseSets:
        within, utilities = [], []
        for rows in units:
            means, errors = [], []
            items = [[_with_parents(contexts[row]).arms[name] for name in (*arms, *PARENTS)] for row in rows]
            pooled = np.mean([[values.mean() for values in of_row] for of_row in items], axis=0)
            best = int(pooled[: len(arms)].argmax())
            for of_row in items:
                behind = of_row[best] - np.array(of_row)
                means.append(behind.mean(1))
                errors.append(behind.std(1, ddof=1) / np.sqrt(behind.shape[1]))
            error = np.sqrt((np.array(errors) ** 2).sum(0)) / len(rows)
            within.append(np.mean(means, axis=0) <= NUM_STANDARD_ERRORS * error)
            utilities.append(pooled)
        return NoiseSets(np.array(utilities), np.array(within), len(arms))

    @property
    def best(self) -> np.ndarray:
        """(U,): the arm with the highest measured utility."""
        return self.utilities[:, : self.num_arms].argmax(1)

    @property
    def majority_share(self) -> float:
        """Share of units in whose noise set the arm lies that is within the most: the best constant, in hindsight."""
        return float(self.within[:, : self.num_arms].mean(0).max())


@dataclass(frozen=True)
class Bench:
    """What policies are measured on: one objective, the units, and samples of the contexts for intervals."""

    scoring: Scoring
    units: list[list[int]]
    noise: NoiseSets
    samples: np.ndarray  # (num_resamples, D)

    @cached_property
    def _by_task(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """By task: which contexts, their (num_resamples, n) counts, and the (num_resamples,) sums of their gaps."""
        found = {}
        for task in np.unique(self.scoring.tasks):
            index = np.flatnonzero(self.scoring.tasks == task)
            counts = np.ascontiguousarray(self.samples[:, index], dtype=float)
            found[str(task)] = index, counts, counts @ self.scoring.gap[index]
        return found

    def _resampled(self, numerators: np.ndarray, task: str) -> np.ndarray:
        """(num_resamples,): of (D,) numerators the ratio of sums on one task; NaN where a sample holds none of it."""
        index, counts, total = self._by_task[task]
        return np.divide(counts @ numerators[index], total, out=np.full(len(total), np.nan), where=total > 0)

    def interval(self, numerators: np.ndarray, tasks: Sequence[str] | None = None) -> list[float] | None:
        """95 % percentile interval of the headline of (D,) numerators; None where no sample holds a pair.

        Args:
            tasks: those that count; None takes all.
        """
        # What `Scoring.headline` computes, from sums that are kept: dozens of policies need it.
        ratios = [self._resampled(numerators, task) for task in (self._by_task if tasks is None else tasks)]
        values = _mean_of_known(ratios) if ratios else np.zeros(0)
        values = values[~np.isnan(values)]
        return [float(value) for value in np.quantile(values, [0.025, 0.975])] if len(values) else None

    def measure(self, shares: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
        """All figures of a policy, and its gain over a reference policy; shares (N, A), NaN rows were not tested.

        Returns:
            gap_closed (per `Scoring.unit`), gain, their intervals; mean_regret, worst_decile_regret (the mean of the
            tenth of the units with the largest), in utility; in_noise_set, share of units; negative, share of the
            defined contexts whose GapClosed is below 0; num_units; tasks: gap_closed, its interval and the number of
            defined contexts of each task. None where nothing of the kind is defined.
        """
        tested = ~np.isnan(shares).any(1) & ~np.isnan(reference).any(1)
        part = self.scoring.among(np.flatnonzero(tested).tolist())
        kept = np.isin(self.scoring.rows, part.rows)
        bench = self if kept.all() else replace(self, scoring=part, samples=self.samples[:, kept])
        taken, baseline = part.taken(shares), part.taken(reference)
        units = [(i, rows[0]) for i, rows in enumerate(self.units) if tested[rows].all()]
        index, rows = [i for i, _ in units], [row for _, row in units]
        options = self.noise.utilities[index]
        regret = options[:, : self.noise.num_arms].max(1) - (shares[rows] * options).sum(1)
        worst = np.sort(regret)[::-1][: max(1, -(-len(regret) // 10))]
        return {
            "gap_closed": _number(part.headline(taken)),
            "interval": bench.interval(taken),
            "gain": _number(part.headline(taken - baseline)),
            "gain_interval": bench.interval(taken - baseline),
            "mean_regret": _number(regret.mean()) if len(regret) else None,
            "worst_decile_regret": _number(worst.mean()) if len(regret) else None,
            "in_noise_set": _number((shares[rows] * self.noise.within[index]).sum(1).mean()) if rows else None,
            "negative": _number((taken < 0).mean()) if len(taken) else None,
            "num_units": len(units),
            "tasks": {str(task): bench._of_task(taken, task) for task in np.unique(part.tasks)},
        }

    def _of_task(self, taken: np.ndarray, task: str) -> dict[str, Any]:
        kept = self.scoring.tasks == task
        scoring = self.scoring.among(self.scoring.rows[kept].tolist())
        return {
            "gap_closed": _number(scoring.headline(taken[kept])),
            "interval": self.interval(taken, (str(task),)),
            "num_contexts": int(kept.sum()),
        }

    def arm_accuracy(self, shares: np.ndarray, arms: Sequence[str]) -> dict[str, dict[str, float]]:
        """Per arm: how often "this arm is the best one" is answered rightly, beside the better constant answer."""
        units = [(i, rows[0]) for i, rows in enumerate(self.units) if not np.isnan(shares[rows]).any()]
        best = self.noise.best[[i for i, _ in units]]
        found = {}
        for k, arm in enumerate(arms):
            said, true = shares[[row for _, row in units], k], best == k
            rate = float(true.mean())
            found[arm] = {
                "accuracy": float(np.where(true, said, 1 - said).mean()),
                "base_rate": max(rate, 1 - rate),
                "best_share": rate,
            }
        return found


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
