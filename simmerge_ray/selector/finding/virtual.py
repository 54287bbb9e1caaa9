"""Scores of plans from signatures alone, and the few of them that are worth running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.finding import FindConfig
from simmerge_ray.plans.operators.specs import parse_arms
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import plain_average
from simmerge_ray.selector.finding.aim import Aim
from simmerge_ray.selector.finding.space import by_operators, spread_sums, sum_of, sums_around
from simmerge_ray.signals.candidates.coefficients import PlanCoefficients
from simmerge_ray.signals.candidates.signatures import OwnAnswers, Owner
from simmerge_ray.signals.candidates.virtual import LogProbs, VirtualAnswers

_REFINED = 16  # of the best sums whose neighbours are looked at
_SUBSETS = 4  # of the best subsets that other operators are tried on
# Of a shortlist: the distance that its candidates keep, and its share that is filled then.
_TURNS = ((0.2, 0.5), (0.1, 0.75), (0.05, 1.0), (0.01, 1.0))


@dataclass(frozen=True)
class VirtualScores:
    """Of N candidates over M checkpoints.

    coefficients: (N, M), of the checkpoints' task vectors. plans: of the candidates that are no sums, by index.
    retention, nll, kl: (N, owners). scores: (N,), which are the aim's.
    """

    ids: tuple[str, ...]
    coefficients: np.ndarray
    plans: Mapping[int, MergePlan]
    retention: np.ndarray
    nll: np.ndarray
    kl: np.ndarray
    scores: np.ndarray

    @property
    def order(self) -> np.ndarray:
        """Indices of the candidates, the best first."""
        return np.argsort(-self.scores, kind="stable")

    def plan(self, index: int) -> MergePlan | None:
        """How a candidate is made; None for the base."""
        if index in self.plans:
            return self.plans[index]
        return sum_of(zip(self.ids, self.coefficients[index].tolist(), strict=True))

    def joined(self, other: VirtualScores) -> VirtualScores:
        """Both, the other's candidates behind the own ones."""
        start = len(self.scores)
        plans = dict(self.plans) | {start + index: plan for index, plan in other.plans.items()}
        names = ("retention", "nll", "kl", "scores")
        arrays = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in names}
        rows = np.concatenate([self.coefficients, other.coefficients])
        return VirtualScores(self.ids, rows, plans, **arrays)


class VirtualScorer:
    """Scores candidates of one catalogue by what they keep of some owners' answers.

    Args:
        ids: of the checkpoints, in the order of the coefficients.
    """

    def __init__(
        self, ids: Sequence[str], answers: Sequence[OwnAnswers], coefficients: PlanCoefficients, aim: Aim
    ) -> None:
        of_owner = {one.owner: one.kept for one in answers}
        self._kept = [of_owner[owner] for owner in aim.owners]
        self._mixtures = [VirtualAnswers(kept) for kept in self._kept]
        self._ids, self._coefficients, self._aim = tuple(ids), coefficients, aim
        self._average: tuple[MergePlan, Sequence[LogProbs]] | None = None

    def curved(self, averaged: Sequence[str], average: Mapping[Owner, LogProbs]) -> VirtualScorer:
        """The scorer that knows what the plain average of some checkpoints does as well.

        Args:
            average: of every owner's answers (`signatures.answers_of_merge`).
        """
        found = copy(self)
        of_owners = [average[owner] for owner in self._aim.owners]
        of_both = zip(self._kept, of_owners, strict=True)
        found._mixtures = [VirtualAnswers(kept, averaged, one) for kept, one in of_both]
        found._average = MergePlan(recipe=plain_average(averaged)), of_owners
        return found

    def known(self) -> dict[MergePlan, tuple[np.ndarray, np.ndarray]]:
        """Retention and nll, (owners,) each, of what has been run over all answers already: of the checkpoints as they
        are, the base, and the average of `curved`. What signatures leave open (`KeptAnswers.kept_and_nll`) is not in
        it."""
        names = (*self._ids, self._aim.base)
        rows: dict[MergePlan, Sequence[LogProbs]] = {
            MergePlan(source=name): [kept.of(name) for kept in self._kept] for name in names
        }
        if self._average is not None:
            rows[self._average[0]] = self._average[1]
        found = {}
        for plan, by_owner in rows.items():
            values = [kept.kept_and_nll(one) for kept, one in zip(self._kept, by_owner, strict=True)]
            sure = [value for value in values if value is not None]
            if len(sure) == len(values):
                found[plan] = np.array([kept for kept, _ in sure]), np.array([nll for _, nll in sure])
        return found

    def coefficients_of(self, plan: MergePlan) -> dict[str, float]:
        """How much of each checkpoint's task vector a plan holds. Raises PlanError: see `PlanCoefficients.of`."""
        return dict(zip(self._ids, self._coefficients.of(plan).tolist(), strict=True))

    def of_sums(self, rows: np.ndarray) -> VirtualScores:
        """Of sums of task vectors. rows: (N, M) weights."""
        return self._scores(rows, {})

    def of_plans(self, plans: Sequence[MergePlan]) -> VirtualScores:
        """Of any recipes. Raises PlanError: see `PlanCoefficients.of`."""
        rows = np.stack([self._coefficients.of(plan) for plan in plans])
        return self._scores(rows, dict(enumerate(plans)))

    def _scores(self, rows: np.ndarray, plans: Mapping[int, MergePlan]) -> VirtualScores:
        with ThreadPoolExecutor() as threads:  # the kernel holds no lock
            found = list(threads.map(lambda mixture: mixture.scores(rows), self._mixtures))
        retention, nll, kl = (np.stack([getattr(one, name) for one in found], 1) for name in ("retention", "nll", "kl"))
        return VirtualScores(self._ids, rows, plans, retention, nll, kl, self._aim.scores(retention, nll))


def virtual_ranking(scorer: VirtualScorer, members: Sequence[str], config: FindConfig) -> VirtualScores:
    """Scores of at least `config.num_recipes` recipes over all subsets of the scorer's checkpoints."""
    found = scorer.of_sums(spread_sums(members, config.ways, config.num_recipes // 2, config.seed))
    best = found.order
    held = found.coefficients[best] > 0
    firsts = np.sort(np.unique(held, axis=0, return_index=True)[1])[: 4 * _SUBSETS]  # each subset where it is best
    subsets = [tuple(name for name, is_in in zip(members, held[at], strict=True) if is_in) for at in firsts]
    large = [subset for subset in subsets if len(subset) > 1][:_SUBSETS]
    if others := by_operators(large, parse_arms(config.arms)):
        found = found.joined(scorer.of_plans(others))
    left = max(len(members), config.num_recipes - len(found.scores))
    near = sums_around(found.coefficients[best[:_REFINED]], config.ways, left, config.seed)
    return found.joined(scorer.of_sums(near))


def shortlist(found: VirtualScores, count: int) -> list[MergePlan]:
    """The best merges that differ from each other: what mixing gets wrong it gets wrong for all neighbours alike.

    Greedy in turns: the best one that is left, then none nearer to it than a distance, which falls from turn to turn.
    Distances are the largest difference of two coefficients.
    """
    taken: list[int] = []
    plans: dict[MergePlan, float] = {}
    for distance, share in _TURNS:
        left = np.isfinite(found.scores)
        for index in taken:
            left &= _distances(found, index) >= distance
        while left.any() and len(plans) < max(1, round(share * count)):
            index = int(np.argmax(np.where(left, found.scores, -np.inf)))
            left &= _distances(found, index) >= distance
            left[index] = False
            plan = found.plan(index)
            if plan is not None and plan.is_merge:
                taken.append(index)
                plans.setdefault(plan, float(found.scores[index]))
    return sorted(plans, key=lambda plan: -plans[plan])


def _distances(found: VirtualScores, index: int) -> np.ndarray:
    """(N,) to one candidate."""
    return np.asarray(np.abs(found.coefficients - found.coefficients[index]).max(1))
