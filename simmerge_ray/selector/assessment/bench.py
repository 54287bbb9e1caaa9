"""What policies are measured on: GapClosed, regret picks within the noise set, intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from simmerge_ray.plans.keeping import merge_arms
from simmerge_ray.search.headroom import NUM_STANDARD_ERRORS, Context, mean_of_known
from simmerge_ray.selector.data.scoring import Scoring, options_of


@dataclass(frozen=True)
class NoiseSets:
    """Per unit (U, A): mean utility of the options, and whether one is not significantly worse than the best arm.

    Significantly: by two standard errors of the differences on the same items, averaged over the unit's tasks.
    num_arms: options that are arms, and with which regret is measured: all, or all but the parents. num_merges: of them
    those that merge.
    """

    utilities: np.ndarray
    within: np.ndarray
    num_arms: int
    num_merges: int

    @staticmethod
    def of(contexts: Sequence[Context], arms: Sequence[str], units: Sequence[Sequence[int]]) -> NoiseSets:
        within, utilities = [], []
        for rows in units:
            options = [contexts[row].with_parents().arms for row in rows]
            items = [np.array([of_row[name] for name in options_of(arms)]) for of_row in options]
            pooled = np.mean([of_row.mean(1) for of_row in items], axis=0)
            best = int(pooled[: len(arms)].argmax())
            behind = [of_row[best] - of_row for of_row in items]
            errors = [one.std(1, ddof=1) / np.sqrt(one.shape[1]) for one in behind]
            error = np.sqrt((np.array(errors) ** 2).sum(0)) / len(rows)
            within.append(np.mean([one.mean(1) for one in behind], axis=0) <= NUM_STANDARD_ERRORS * error)
            utilities.append(pooled)
        return NoiseSets(np.array(utilities), np.array(within), len(arms), len(merge_arms(arms)))

    @property
    def best(self) -> np.ndarray:
        """(U,): the arm with the highest measured utility."""
        return self.utilities[:, : self.num_arms].argmax(1)

    @property
    def majority_share(self) -> float:
        """Share of units whose noise set holds the operator that is in the most of them: the best constant in
        hindsight."""
        return float(self.within[:, : self.num_merges].mean(0).max())


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

    def interval(self, numerators: np.ndarray, tasks: Sequence[str] | None = None) -> list[float] | None:
        """95 % percentile interval of the headline of (D,) numerators; None where no sample holds a pair. tasks: those
        that count; None takes all."""
        # What `Scoring.headline` computes, from sums that are kept: dozens of policies need it.
        # On one task the ratio of sums is NaN where a sample holds none of it.
        ratios = []
        for index, counts, total in (self._by_task[task] for task in (self._by_task if tasks is None else tasks)):
            unknown = np.full(len(total), np.nan)
            ratios.append(np.divide(counts @ numerators[index], total, out=unknown, where=total > 0))
        values = mean_of_known(ratios) if ratios else np.zeros(0)
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
        """Per arm: how often "this arm is the best one" is answered correctly, and the better constant answer."""
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
