"""Recipes ranked by what they keep of their members' answers, from what `simmerge signals` has stored.

Nothing is merged or run, and no label is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from simmerge_ray.base.config import parse_ways
from simmerge_ray.base.errors import ConfigError, InputError, PlanError, StoreError, unknown_name
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.probes import ProbeSet
from simmerge_ray.plans.plan import MergePlan, plan_from_json
from simmerge_ray.plans.recipe import plain_average
from simmerge_ray.service.recipe_schemas import (
    MAX_COMPARED,
    AnswersOwner,
    RecipesRequest,
    RetentionRanking,
    ScoredPlan,
)
from simmerge_ray.service.schemas import PlansRequest, Refused
from simmerge_ray.signals.queue import WorkQueue
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore
from simmerge_ray.signals.table import SignalTable

if TYPE_CHECKING:  # torch's models and numba are imported with the first request that needs them
    from simmerge_ray.selector.finding.sources import FindSources
    from simmerge_ray.selector.finding.virtual import VirtualScores

NUM_RECIPES = 2_000  # that a request for the best ones scores
MAX_RUN = 100  # recipes of a request whose operator is run on a sample of the weights, up to 0.1 s each
_SUMS = ("linear", "task_arithmetic")
_KEPT_SETS = 8  # sets of checkpoints whose answers stay in memory, 40 MB each at the most usual sizes
_KEPT_RANKINGS = 64


@dataclass(frozen=True)
class RetentionCurve:
    """Sums of task vectors `scale * (w left + (1 - w) right)`. weights: (N,) of left. retention: (N, 2) of left's and
    right's answers. scores: (N,)."""

    weights: np.ndarray
    retention: np.ndarray
    scores: np.ndarray


class RetentionRanker:
    """Scores recipes over the checkpoints of a catalogue. For one thread.

    Every method raises Refused (409): this service has no catalogue, probes or answers, with the remedy. PlanError,
    ConfigError, OperatorError, ProbeError: what does not fit in the request. StoreError: the store cannot be read now.

    Args:
        table: of the catalogue's signals. probe_sets: the probes that it was made with.
    """

    def __init__(
        self,
        table: SignalTable,
        catalogue: Catalogue | None,
        probe_sets: Mapping[str, ProbeSet] | None,
        signatures: str | None,
    ) -> None:
        self._table, self._catalogue, self._probe_sets, self._signatures = table, catalogue, probe_sets, signatures
        self._sources = lru_cache(_KEPT_SETS)(self._read)
        self._ranked = lru_cache(_KEPT_RANKINGS)(self._rank)

    def best(self, request: PlansRequest) -> RetentionRanking:
        """The best recipes of some checkpoints that differ from each other, and the checkpoints as they are."""
        ways = parse_ways(str(request.ways))
        return self._ranked(self._members(request.checkpoints), ways, request.task, request.top)

    def scored(self, request: RecipesRequest) -> RetentionRanking:
        """Recipes by their scores over the answers of all their members."""
        plans = [_plan_of(number, one.model_dump(mode="json", exclude_unset=True))
                 for number, one in enumerate(request.recipes, 1)]  # fmt: skip
        slow = sum(one.arms[0].operator not in _SUMS for one in plans if one.is_merge)
        if slow > MAX_RUN:
            raise PlanError(
                f"{slow} recipes have another operator than {' and '.join(_SUMS)}; a request may have {MAX_RUN} such, "
                "since each is run on a sample of the weights"
            )
        named = dict.fromkeys(name for plan in plans for name in plan.members)
        sources = self._sources(self._members(list(named)), request.task)
        found = _of_plans(sources, plans)
        rows = _scored_plans(found, plans)
        for index, row in enumerate(rows):
            row.index = index
        order = found.order.tolist()
        return RetentionRanking(owners=_owners(sources), plans=[rows[n] for n in order], num_considered=len(plans))

    def curve(self, left: str, right: str, scale: float, num: int = 41) -> RetentionCurve:
        """What is kept along the line between two checkpoints."""
        if left == right:
            raise PlanError(f"left and right are both {left!r}; give two different checkpoints")
        members = self._members([left, right])
        sources, weights = self._sources(members, None), np.linspace(0.0, 1.0, num)
        shares = {left: weights, right: 1.0 - weights}
        found = sources.scorer.of_sums(scale * np.stack([shares[name] for name in members], 1))
        return RetentionCurve(weights, found.retention[:, [members.index(left), members.index(right)]], found.scores)

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Ids of the checkpoints whose own task has probes."""
        if self._catalogue is None or self._probe_sets is None:
            return ()
        return tuple(name for name in self._catalogue.ids if self._catalogue.own_task.get(name) in self._probe_sets)

    def _members(self, names: Sequence[str] | None) -> tuple[str, ...]:
        """In the catalogue's order, without the base."""
        if self._catalogue is None or self._catalogue.base is None or not self._probe_sets or not self._signatures:
            raise Refused(
                409,
                "this service cannot tell what a merge keeps: start it with --catalogue (which names a base) and "
                "--probes, those that `simmerge signals` was given",
            )
        known, base = self._catalogue.ids, self._catalogue.base.id
        chosen = set(self.checkpoints if names is None else names) - {base}
        for name in sorted(chosen):
            if name not in known:
                raise PlanError(unknown_name("checkpoint", name, known))
        if not 1 <= len(chosen) <= MAX_COMPARED:
            raise PlanError(
                f"what is kept of {len(chosen)} checkpoints is asked for; name 1 to {MAX_COMPARED} beside the base"
            )
        return tuple(name for name in known if name in chosen)

    def _read(self, members: tuple[str, ...], task: str | None) -> FindSources:
        from simmerge_ray.selector.finding.sources import find_request, find_sources

        assert self._catalogue is not None and self._probe_sets is not None and self._signatures is not None
        tasks = sorted({own for name in members if (own := self._catalogue.own_task.get(name))})
        if task is not None and task not in tasks:
            raise PlanError(unknown_name("task", task, tasks))
        config = FindConfig(members=members, objective=task or "mean", ways=(1, len(members)))
        request = find_request(self._catalogue, self._probe_sets, config)
        provenance = self._table.provenance
        digests: Mapping[str, str] = provenance["checkpoints"]
        if unknown := [ref.id for ref in request.catalogue.all_refs if ref.id not in digests]:
            raise Refused(
                409,
                f"the signal table does not have checkpoint {unknown[0]!r}; run `simmerge signals` on this catalogue",
            )
        spec = SignatureSpec(**provenance["spec"])
        try:
            return find_sources(request, SignatureStore(self._signatures), _only_stored, spec, digests)
        except OSError as error:
            raise StoreError(f"the signature store cannot be read: {error}") from None

    def _rank(self, members: tuple[str, ...], ways: tuple[int, int], task: str | None, top: int) -> RetentionRanking:
        from simmerge_ray.selector.finding.space import kept_checkpoints
        from simmerge_ray.selector.finding.virtual import shortlist, virtual_ranking

        low, high = ways
        if not 1 <= low <= min(high, len(members)):
            raise ConfigError(f"ways {low}-{high}: the smaller number first, and there are {len(members)} checkpoints")
        sources = self._sources(members, task)
        ways = (low, min(high, len(members)))
        config = FindConfig(ways=ways, num_recipes=NUM_RECIPES)
        found = virtual_ranking(sources.scorer, members, config)
        plans = shortlist(found, top)
        if low <= len(members) <= high and len(members) > 1:
            average = MergePlan(recipe=plain_average(members))
            plans = list({plan.id: plan for plan in [*plans, average]}.values())
        # Once more, since their weights are rounded.
        rows = sorted(_scored_plans(_of_plans(sources, plans), plans), key=lambda one: -one.score) if plans else []
        assert self._catalogue is not None and self._catalogue.base is not None
        kept = kept_checkpoints(members, self._catalogue.base.id)
        as_they_are = sorted(_scored_plans(_of_plans(sources, kept), kept), key=lambda one: -one.score)
        return RetentionRanking(
            owners=_owners(sources), plans=rows[:top], checkpoints=as_they_are, num_considered=len(found.scores)
        )


def _only_stored(queue: WorkQueue) -> Iterator[tuple[int, Any]]:
    """An executor of units that computes nothing."""
    missing = {"samples of weights" if unit.kind == "sample" else "answers": unit.checkpoint for unit in queue.units}
    names = sorted({unit.checkpoint for unit in queue.units if unit.checkpoint})
    raise Refused(
        409,
        f"no {' and no '.join(sorted(missing))} of {', '.join(names[:5])}{' and others' if names[5:] else ''} in the "
        "signature store; run `simmerge signals` again, with the same probes and without --no-answers",
    )


def _plan_of(number: int, value: Mapping[str, Any]) -> MergePlan:
    try:
        plan = plan_from_json(value)
    except InputError as error:
        raise PlanError(f"recipe {number}: {error}") from None
    if plan.needs_grams:
        raise PlanError(f"recipe {number}: what {plan.arms[0].operator!r} keeps cannot be told from signatures")
    return plan


def _of_plans(sources: FindSources, plans: Sequence[MergePlan]) -> VirtualScores:
    try:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            found = sources.scorer.of_plans(plans)
    except np.linalg.LinAlgError:
        found = None
    if found is None or not np.isfinite(found.coefficients).all():
        raise PlanError("a recipe divides by the sum of its weights, which is 0; give other weights")
    return found


def _owners(sources: FindSources) -> list[AnswersOwner]:
    return [AnswersOwner(checkpoint=owner.checkpoint, task=owner.task) for owner in sources.aim.owners]


def _scored_plans(found: VirtualScores, plans: Sequence[MergePlan]) -> list[ScoredPlan]:
    """In the order of the plans."""
    columns = (found.scores, found.retention, found.nll, found.kl)
    return [
        ScoredPlan(id=plan.id, label=plan.label, score=score, retention=retention, nll=nll, kl=kl, plan=plan.to_json())
        for plan, score, retention, nll, kl in zip(plans, *(column.tolist() for column in columns), strict=True)
    ]
