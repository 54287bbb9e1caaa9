"""Plans over several checkpoints: ranked for whoever asks, and one of a shortlist drawn as a decision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.config import RankingConfig, parse_ways
from simmerge_ray.base.errors import InputError, PlanError, SelectorError, unknown_name
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.selector.planning.request import RankingSources
from simmerge_ray.selector.planning.scorer import RankedPlan, Ranking
from simmerge_ray.service.bandit.policy import keyed_uniform, sampled
from simmerge_ray.service.bandit.propensities import Draws, thompson_propensities, with_floor
from simmerge_ray.service.registry import Published
from simmerge_ray.service.schemas import DecisionRequest, Influence, PlanPrediction, PlansRequest
from simmerge_ray.signals.propagation.evidence import stored_evidence
from simmerge_ray.signals.propagation.interface import Propagator
from simmerge_ray.signals.propagation.second_order import SecondOrder
from simmerge_ray.signals.propagation.table import PROPAGATORS
from simmerge_ray.signals.signature import SignatureStore
from simmerge_ray.signals.table import SignalTable

MAX_SHORTLIST = 32  # plans among which one is drawn, with exact probabilities
BUDGET = 50_000  # plans that a request may score; beyond that a beam of about so many
MIN_SPREAD = 0.01  # of a plan's prediction: an ensemble that agrees is not certain
_RERANKED = 100


@dataclass(frozen=True)
class DrawnPlan:
    """Which plan of a shortlist to make. propensities: (N,), of all of them."""

    plans: tuple[RankedPlan, ...]
    chosen: int
    propensities: np.ndarray


class PlanRanker:
    """Ranks plans over the checkpoints of a signal table with a published selector.

    catalogue, signatures: where both are given, `virtual` ranks the shortlist; else `second_order` ranks all.
    """

    def __init__(
        self,
        published: Published,
        table: SignalTable,
        catalogue: Catalogue | None = None,
        signatures: str | None = None,
    ) -> None:
        if published.shortlist is None:
            raise SelectorError("plans need the selector of the shortlist, too; `simmerge train` writes both")
        propagator = _virtual(table, catalogue, signatures)
        selector = published.shortlist if propagator is None else published.selector
        self._sources = RankingSources(
            selector, published.shortlist, table, table.checkpoint_ids, table.provenance["own_task"],
            lambda: propagator or SecondOrder(table),
        )  # fmt: skip

    def rank(self, request: DecisionRequest | PlansRequest, top: int) -> Ranking:
        """The best plans. Raises PlanError, ConfigError: an unknown checkpoint or task, or ways that do not fit."""
        known, checkpoints = self._sources.ids, request.checkpoints or ()
        for name in checkpoints:
            if name not in known:
                raise PlanError(unknown_name("checkpoint", name, known))
        config = RankingConfig(
            tasks=(request.task,) if request.task else (),
            ways=parse_ways(str(request.ways)),
            exclude=tuple(set(known) - set(checkpoints)) if checkpoints else (),
            budget=BUDGET,
            shortlist=max(_RERANKED, top),
        )
        return self._sources.request(config).rank(top)

    def draw(self, request: DecisionRequest, decision_id: str, floor: float) -> DrawnPlan:
        """One plan of a shortlist, by a Thompson draw from `N(utility, sd^2)` of each. Raises as `rank`."""
        plans = self.rank(request, MAX_SHORTLIST).plans
        location = np.array([one.utility for one in plans])
        if not request.explore:
            first = int(np.argmax(location))
            return DrawnPlan(plans, first, np.eye(len(plans))[first])
        draws = Draws(location, np.maximum([one.sd for one in plans], MIN_SPREAD)).floored()
        share = min(floor, 1 / len(plans))
        propensities = with_floor(thompson_propensities(draws), share)
        if keyed_uniform(decision_id, "", "floor") < len(plans) * share:
            chosen = int(keyed_uniform(decision_id, "", "floor arm") * len(plans))
        else:
            uniforms = np.array([keyed_uniform(decision_id, one.plan.id) for one in plans])
            chosen = int(sampled(draws, uniforms).argmax())
        return DrawnPlan(plans, chosen, propensities)


def plan_prediction(one: RankedPlan, propensity: float | None = None) -> PlanPrediction:
    """A plan as the API has it; `plan` is what `simmerge merge` reads, by ids."""
    return PlanPrediction(
        id=one.plan.id,
        label=one.plan.label,
        utility=None if one.unlike else one.utility,
        sd=None if one.unlike else one.sd,
        interval=None if one.unlike else one.interval,
        propensity=propensity,
        why=[] if one.unlike else [Influence(signal=name, effect=effect) for name, effect in one.why],
        plan=one.plan.to_json(),
    )


def _virtual(table: SignalTable, catalogue: Catalogue | None, signatures: str | None) -> Propagator | None:
    if catalogue is None or signatures is None:
        return None
    try:
        return PROPAGATORS["virtual"](stored_evidence(table, catalogue, SignatureStore(signatures)))
    except (InputError, OSError):
        return None
