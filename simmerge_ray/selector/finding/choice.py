"""From signatures to the few best merges: thousands scored, some run, and what each keeps of every member."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.plans.operators.specs import parse_arms
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import plain_average
from simmerge_ray.selector.finding.aim import Aim
from simmerge_ray.selector.finding.probed import ProbedPlan, Prober, RunTrials, halve
from simmerge_ray.selector.finding.sources import FindRequest, FindSources
from simmerge_ray.selector.finding.space import (
    Subset,
    by_operators,
    kept_checkpoints,
    spread_sums,
    sums_around,
)
from simmerge_ray.selector.finding.virtual import VirtualScorer, VirtualScores, shortlist

_REFINED = 16  # of the best sums whose neighbours are looked at
_SUBSETS = 4  # of the best subsets that other operators are tried on


@dataclass(frozen=True)
class Finding:
    """ranked: what was run over all probes, the best first; of equally good ones checkpoints before merges.
    virtual: everything that was scored. average: the plain average, run as well; None for fewer than two members.
    """

    aim: Aim
    ranked: tuple[ProbedPlan, ...]
    virtual: VirtualScores
    average: MergePlan | None

    @property
    def best(self) -> ProbedPlan:
        return self.ranked[0]

    @property
    def merges(self) -> list[ProbedPlan]:
        """The merges among them, the best first; the plain average is one."""
        return [one for one in self.ranked if one.plan.is_merge]

    @property
    def checkpoints(self) -> list[ProbedPlan]:
        """The checkpoints as they are, the best first."""
        return [one for one in self.ranked if not one.plan.is_merge]


def virtual_ranking(scorer: VirtualScorer, members: Sequence[str], config: FindConfig) -> VirtualScores:
    """Scores of at least `config.num_recipes` recipes over all subsets of the scorer's checkpoints."""
    found = scorer.of_sums(spread_sums(members, config.ways, config.num_recipes // 2, config.seed))
    best = found.order
    subsets: dict[Subset, None] = {}
    for index in best.tolist():
        subsets.setdefault(tuple(name for name, w in zip(members, found.coefficients[index], strict=True) if w > 0))
        if len(subsets) == 4 * _SUBSETS:
            break
    large = [subset for subset in subsets if len(subset) > 1][:_SUBSETS]
    if others := by_operators(large, parse_arms(config.arms)):
        found = found.joined(scorer.of_plans(others))
    left = max(len(members), config.num_recipes - len(found.scores))
    near = sums_around(found.coefficients[best[:_REFINED]], config.ways, left, config.seed)
    return found.joined(scorer.of_sums(near))


def choose(
    request: FindRequest,
    sources: FindSources,
    run: RunTrials,
    report: Callable[[str], None] | None = None,
) -> Finding:
    """The choice among recipes of the request's members.

    Args:
        run: measures candidates on answers (`probed.Prober`). report: called with a line about each round.

    Raises:
        ConfigError: nothing could be run.
    """
    members, config = request.catalogue.ids, request.config
    found = virtual_ranking(sources.scorer, members, config)
    if report:
        report(f"{len(found.scores)} candidates scored from signatures")
    average = MergePlan(recipe=plain_average(members)) if len(members) > 1 else None
    always = [*kept_checkpoints(members, request.base), *([average] if average else [])]
    prober = Prober(request.catalogue, sources.answers, sources.aim, run)
    ranked = halve(prober, shortlist(found, config.shortlist), always, report)
    if not ranked:
        raise ConfigError("no candidate could be run over the probes; the log says why")
    return Finding(sources.aim, tuple(ranked), found, average)
