"""The choice without labels, by the product's own functions: which recipe, from how many probes, of how many members.

Nothing here sees an item of an evaluation; utilities are measured afterwards.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.finding.samplers import incumbent
from benchmarks.finding.utilities import HALVES, Bench
from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.checkpoints.probes import GENERAL, ProbeSet, general_probe_set
from simmerge_ray.plans.plan import MergePlan, plan_from_json
from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator
from simmerge_ray.search.setup import PreparedSearch
from simmerge_ray.selector.finding.choice import choose
from simmerge_ray.selector.finding.probed import RunTrials, in_this_process
from simmerge_ray.selector.finding.sources import FindSources, find_request, find_sources
from simmerge_ray.signals.compute import local_executor
from simmerge_ray.signals.signature import SignatureStore

PROBES: Mapping[str, int | None] = {"64 probes": None, "16 probes": 16, "4 probes": 4, "general probes": None}
EVALUATIONS = (0, 1, 2, 4, 8)


def sources_of(
    bench: Bench, members: Sequence[str], probes: str = "64 probes", config: FindConfig | None = None
) -> tuple[Any, FindSources]:
    """Request and sources of a choice, signatures kept in the cache."""
    catalogue, count = bench.catalogue, PROBES[probes]
    sets = {task: ProbeSet(task, one.probes[:count]) for task, one in bench.probes.items()}
    if probes == "general probes":
        catalogue = replace(catalogue, own_task=dict.fromkeys(catalogue.ids, GENERAL))
        sets = {GENERAL: general_probe_set()}
    given = config or FindConfig()
    request = find_request(catalogue, sets, given.model_copy(update={"members": tuple(members)}))
    store = SignatureStore(str(bench.cache / "signatures"))
    return request, find_sources(request, store, local_executor(request.catalogue))


def in_one_process(labels: str) -> RunTrials:
    """Runs candidates here, with one evaluator."""

    def start(search: PreparedSearch) -> TransformersEvaluator:
        return TransformersEvaluator(search.template, "float32", max_model_len=search.settings.max_model_len)

    return in_this_process(SearchConfig(evaluator="transformers", pairs="all"), labels, start)


def label_free(bench: Bench, members: Sequence[str], probes: str = "64 probes") -> dict[str, Any]:
    """What is chosen: the candidates run over all probes, best first, and the seconds without signatures."""
    request, sources = sources_of(bench, members, probes)
    with tempfile.TemporaryDirectory() as labels:
        run = in_one_process(labels)
        began = time.perf_counter()
        found = choose(request, sources, run)
        seconds = time.perf_counter() - began
    return {
        "ranked": [
            {
                "plan": one.plan.to_json(),
                "score": round(one.score, 6),
                "retention": np.round(one.retention, 5).tolist(),
                "nll": np.round(one.nll, 5).tolist(),
            }
            for one in found.ranked
        ],
        "num_virtual": len(found.virtual.scores),
        "seconds": round(seconds, 3),
    }


def ranked_plans(chosen: Mapping[str, Any]) -> list[MergePlan]:
    """From what `label_free` gave."""
    return [plan_from_json(one["plan"]) for one in chosen["ranked"]]


def with_evaluations(bench: Bench, plans: Sequence[MergePlan], tasks: Sequence[str]) -> list[float]:
    """Utility when the first 0, 1, 2, 4, 8 of the ranking are measured on one half of the items: the best of them on
    the other half, both ways. With 0 and 1 it is the first."""
    found = []
    for count in EVALUATIONS:
        each = []
        for half in HALVES:
            best = incumbent(bench, plans[: max(1, count)], tasks, half)
            each.append(bench.utilities.mean(best, tasks, 1 - half))
        found.append(float(np.mean(each)))
    return found


def chosen_pairs(
    bench: Bench, groups: Sequence[tuple[str, ...]], probes: str = "64 probes"
) -> dict[str, dict[str, Any]]:
    """By members (`a+b`): what is chosen, its utility on all items of the members' tasks, and the curve."""
    kept, found = bench.kept("chosen"), {}
    for members in groups:
        joined = "+".join(members)
        chosen = kept.of(f"{joined} {probes}", lambda members=members: label_free(bench, members, probes))
        plans, tasks = ranked_plans(chosen), bench.tasks_of(members)
        found[joined] = {
            "plan": plans[0].label,
            "weights": member_shares(plans[0], members),
            "utility": bench.utilities.mean(plans[0], tasks),
            "curve": with_evaluations(bench, plans, tasks),
            "seconds": chosen["seconds"],
            "num_virtual": chosen["num_virtual"],
        }
        bench.report(f"chosen from {probes}: {joined} {found[joined]['utility']:.3f} {plans[0].label}")
    return found


def member_shares(plan: MergePlan, members: Sequence[str]) -> list[float]:
    """Weight of each member in a plan, 1 of a checkpoint as it is."""
    if plan.recipe is None:
        return [float(name in plan.members) for name in members]
    weights = dict(zip(plan.recipe.members, plan.recipe.weights, strict=True))
    return [float(weight) if isinstance(weight := weights.get(name, 0.0), int | float) else 1.0 for name in members]
