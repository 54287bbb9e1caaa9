"""Where a mixture of answers is wrong: the plain average is run once, and candidates are scored with what it shows."""

from __future__ import annotations

import logging
from dataclasses import replace

from simmerge_ray.base.errors import CheckpointError
from simmerge_ray.base.finding import FEW_MEMBERS
from simmerge_ray.plans.plan import MergePlan, resolve_plan
from simmerge_ray.plans.recipe import plain_average
from simmerge_ray.selector.finding.sources import FindRequest, FindSources
from simmerge_ray.selector.finding.virtual import virtual_ranking
from simmerge_ray.signals.candidates.signatures import answers_of_merge
from simmerge_ray.signals.queue import Executor
from simmerge_ray.signals.signature import SignatureStore

_log = logging.getLogger(__name__)


def curved_sources(
    request: FindRequest, sources: FindSources, store: SignatureStore, executor: Executor
) -> FindSources:
    """Sources whose scorer knows what the plain average does (`signals.candidates.virtual`, `curved`).

    Of few members it is the average of all, of many that of the members of the best straight mixture: every pair of
    them is bent alike, which says little for a large group. Sources stay as they are where nothing is merged, or where
    the average cannot be run.
    """
    members = _averaged(request, sources)
    if len(members) < 2:
        return sources
    merge = resolve_plan(MergePlan(recipe=plain_average(members)), request.catalogue)
    try:
        average = answers_of_merge(merge, sources.answers, store, executor, sources.digests)
    except CheckpointError as error:
        _log.warning("candidates are scored as straight mixtures: %s", error)
        return sources
    return replace(sources, scorer=sources.scorer.curved(members, average))


def _averaged(request: FindRequest, sources: FindSources) -> tuple[str, ...]:
    """Members of the average that is looked at; none where nothing of several members is asked for."""
    members, config = request.catalogue.ids, request.config
    if config.ways[1] < 2:
        return ()
    if len(members) <= FEW_MEMBERS:
        return members
    found = virtual_ranking(sources.scorer, members, config)
    best = map(found.plan, found.order.tolist())
    return next((plan.members for plan in best if plan is not None and len(plan.members) > 1), ())
