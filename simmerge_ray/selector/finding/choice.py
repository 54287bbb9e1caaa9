"""From signatures to the few best merges: thousands scored, some run, and what each keeps of every member."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import plain_average
from simmerge_ray.selector.finding.aim import Aim
from simmerge_ray.selector.finding.probed import ProbedPlan, Prober, RunTrials, halve
from simmerge_ray.selector.finding.sources import FindRequest, FindSources
from simmerge_ray.selector.finding.space import kept_checkpoints
from simmerge_ray.selector.finding.virtual import VirtualScores, shortlist, virtual_ranking


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


def choose(
    request: FindRequest,
    sources: FindSources,
    run: RunTrials,
    report: Callable[[str], None] | None = None,
    is_exact: bool = True,
) -> Finding:
    """The choice among recipes of the request's members.

    Args:
        run: measures candidates on answers (`probed.Prober`). report: called with a line about each round. is_exact:
            candidates are run in float32, as checkpoints were for their signatures, so that these are not run again.

    Raises:
        ConfigError: nothing could be run.
    """
    members, config = request.catalogue.ids, request.config
    found = virtual_ranking(sources.scorer, members, config)
    if report:
        report(f"{len(found.scores)} candidates scored from signatures")
    average = MergePlan(recipe=plain_average(members)) if len(members) > 1 else None
    always = [*kept_checkpoints(members, request.base), *([average] if average else [])]
    known = sources.scorer.known() if is_exact else {}
    prober = Prober(request.catalogue, sources.answers, sources.aim, run, known)
    ranked = halve(prober, shortlist(found, config.num_run(len(members))), always, report)
    if not ranked:
        raise ConfigError("no candidate could be run over the probes; the log says why")
    return Finding(sources.aim, tuple(ranked), found, average)
