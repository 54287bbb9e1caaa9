"""How good are choices of arms? GapClosed of any policy, on the same contexts.

A policy is an array of *shares* (N, A): how often it takes each option for a context. Options are the merge
operators and, for policies that may keep a parent, both parents: `keep(left)`, `keep(right)`. One rule makes shares of
scores (N, A): the best score of the context, or of all contexts of the pair together where one arm serves the whole
merge; ties are split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.plans.keeping import KEEP_ARMS, keeps, merge_arms
from simmerge_ray.search.headroom import Context, defined_gaps, headline
from simmerge_ray.selector.data.splits import pairs_of, rows_by_pair

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
        """Of all contexts, options being the arms and both parents, whether the arms name these or not."""
        gaps = defined_gaps([context.with_parents() for context in contexts], options_of(arms))
        if len(gaps.rows):
            return Scoring(gaps.rows, np.array(gaps.tasks), gaps.closed, gaps.gap, GAP_CLOSED)
        tasks, num = np.array([context.task for context in contexts]), len(contexts)
        return Scoring(np.arange(num), tasks, option_utilities(contexts, arms), np.ones(num), UTILITY)

    def among(self, rows: Sequence[int]) -> Scoring:
        """The contexts among the given rows, which keep their numbers."""
        kept = np.isin(self.rows, np.asarray(rows, dtype=np.int64))
        return Scoring(self.rows[kept], self.tasks[kept], self.closed[kept], self.gap[kept], self.unit)

    def headline(self, numerators: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """(..., D) numerators -> (...): see `search.headroom.headline`; weights: (..., D), how often each counts."""
        return headline(self.tasks, numerators, self.gap, weights)

    def fixed(self) -> np.ndarray:
        """(A,): the headline of each option taken everywhere; NaN where no context is left."""
        return self.headline(self.closed.T)

    def best_fixed(self) -> int:
        """Of the merge operators the one with the best headline; the first if there is none. A parent is never the
        best fixed arm: which of the two is called left says nothing."""
        headline = self.fixed()[:-2]
        return 0 if np.isnan(headline).all() else int(np.nanargmax(headline))

    def taken(self, shares: np.ndarray) -> np.ndarray:
        """(N, A) shares -> (D,) numerators."""
        return (shares[self.rows] * self.closed).sum(1)


def options_of(arms: Sequence[str]) -> tuple[str, ...]:
    """The merge operators among the arms, then both parents."""
    return (*merge_arms(arms), *KEEP_ARMS)


def option_utilities(contexts: Sequence[Context], arms: Sequence[str]) -> np.ndarray:
    """(N, A): mean utility of each merge operator and of both parents."""
    options = [[one.with_parents().arms[option] for option in options_of(arms)] for one in contexts]
    return np.array([[items.mean() for items in of_context] for of_context in options])


def option_scores(scores: np.ndarray, arms: Sequence[str]) -> np.ndarray:
    """(N, K) scores of arms -> (N, A): where a parent is none of the arms it is never chosen."""
    return scores if keeps(arms) else keeping_no_parent(scores)


def keeping_no_parent(scores: np.ndarray) -> np.ndarray:
    """(N, A - 2) -> (N, A): scores of merges alone, a parent is never chosen; rows without scores stay NaN."""
    none = np.where(np.isnan(scores).any(1, keepdims=True), np.nan, -np.inf)
    return np.hstack([scores, none, none])


def units_of(contexts: Sequence[Context], per_merge: bool) -> list[list[int]]:
    """Rows that share one choice: those of a pair, or each row alone."""
    if not per_merge:
        return [[row] for row in range(len(contexts))]
    return list(rows_by_pair(pairs_of(contexts)).values())


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
