"""The choice without labels, by the product's own functions: which recipe, from how many probes, of how many members.

Nothing here sees an item of an evaluation; utilities are measured afterwards.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.finding.samplers import incumbent
from benchmarks.finding.utilities import HALVES, Bench
from simmerge_ray.base.config import SearchConfig, TuneConfig
from simmerge_ray.base.finding import FindConfig
from simmerge_ray.checkpoints.probes import GENERAL, ProbeSet, general_probe_set
from simmerge_ray.pipelines.auto.request import Tuned
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, plan_from_json
from simmerge_ray.plans.recipe import recipe_of
from simmerge_ray.search.evaluation.transformers_evaluator import TransformersEvaluator
from simmerge_ray.search.setup import PreparedSearch
from simmerge_ray.selector.finding.choice import choose
from simmerge_ray.selector.finding.curve import curved_sources
from simmerge_ray.selector.finding.probed import Prober, RunTrials, in_this_process
from simmerge_ray.selector.finding.sources import FindSources, find_request, find_sources
from simmerge_ray.signals.compute import local_executor
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore
from simmerge_ray.signals.tokens import tokenize_probes
from simmerge_ray.signals.tuning.prepare import held_out_answers, prepare_tuning
from simmerge_ray.signals.tuning.tuner import tune_coefficients

PROBES: Mapping[str, int | None] = {"64 probes": None, "16 probes": 16, "4 probes": 4, "general probes": None}
EVALUATIONS = (0, 1, 2, 4, 8)


def sources_of(
    bench: Bench,
    members: Sequence[str],
    probes: str = "64 probes",
    config: FindConfig | None = None,
    average: SignatureStore | None = None,
) -> tuple[Any, FindSources]:
    """Request and sources of a choice, signatures kept in the cache; what the average answers in `average`, if that is
    given."""
    catalogue, count = bench.catalogue, PROBES[probes]
    sets = {task: ProbeSet(task, one.probes[:count]) for task, one in bench.probes.items()}
    if probes == "general probes":
        catalogue = replace(catalogue, own_task=dict.fromkeys(catalogue.ids, GENERAL))
        sets = {GENERAL: _of_few_tokens(general_probe_set(), bench)}
    given = config or FindConfig()
    request = find_request(catalogue, sets, given.model_copy(update={"members": tuple(members)}))
    store = SignatureStore(str(bench.cache / "signatures"))
    executor = local_executor(request.catalogue)
    return request, curved_sources(request, find_sources(request, store, executor), average or store, executor)


def _of_few_tokens(probes: ProbeSet, bench: Bench) -> ProbeSet:
    """Those that the zoo's models can read and answer: its tokens are characters, its context is short."""
    most = min(SignatureSpec().max_tokens, bench.live.model.config.max_position_embeddings - FindConfig().max_tokens)
    short = [one for one in probes.probes if len(bench.tokenizer(one.text)["input_ids"]) <= most]
    return ProbeSet(probes.task, tuple(short))


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
    kept = bench.kept("chosen")

    def chosen_of(members: tuple[str, ...]) -> dict[str, Any]:
        chosen = kept.of(f"{'+'.join(members)} {probes}", lambda: label_free(bench, members, probes))
        plans, tasks = ranked_plans(chosen), bench.tasks_of(members)
        return {
            "plan": plans[0].label,
            "weights": member_shares(plans[0], members),
            "utility": bench.utilities.mean(plans[0], tasks),
            "by_task": [bench.utilities.mean(plans[0], [task]) for task in tasks],
            "curve": with_evaluations(bench, plans, tasks),
            "seconds": chosen["seconds"],
            "num_virtual": chosen["num_virtual"],
        }

    return bench.each(f"chosen from {probes}", groups, chosen_of)


def member_shares(plan: MergePlan, members: Sequence[str]) -> list[float]:
    """Weight of each member in a plan, 1 of a checkpoint as it is."""
    if plan.recipe is None:
        return [float(name in plan.members) for name in members]
    weights = dict(zip(plan.recipe.members, plan.recipe.weights, strict=True))
    return [float(weight) if isinstance(weight := weights.get(name, 0.0), int | float) else 1.0 for name in members]


def tuned_answer(bench: Bench, members: Sequence[str], chosen: Mapping[str, Any], groups: str) -> dict[str, Any]:
    """The choice tuned as `simmerge auto` does it: from its own weights, and taken where it is better on what is held
    out. Returns the answer's plan, both plans' scores and shares kept there, and the seconds of tuning."""
    request, sources = sources_of(bench, members)
    best = ranked_plans(chosen)[0]
    config = TuneConfig(groups=groups)  # type: ignore[arg-type]
    start = recipe_of(make_arm("task_arithmetic"), sources.scorer.coefficients_of(best))
    began = time.perf_counter()
    batches = tokenize_probes(request.catalogue, request.probe_sets, SignatureSpec(), config.max_tokens)
    prepared = prepare_tuning(request.catalogue, batches, config, start=start)
    state = tune_coefficients(prepared.model, prepared.batches, prepared.start, config)
    seconds = time.perf_counter() - began
    tuned = MergePlan(recipe=prepared.recipe(state.best))
    with tempfile.TemporaryDirectory() as labels:
        prober = Prober(request.catalogue, sources.answers, sources.aim, in_one_process(labels))
        held_out = partial(held_out_answers, share=config.held_out)
        probed = {one.plan.id: one for one in prober.probe([tuned, best], prober.parts, held_out)}
    ours, rival = probed[tuned.id], probed[best.id]
    is_better = Tuned(ours, ours, rival).is_better
    return {
        "plan": (tuned if is_better else best).to_json(),
        "tuned": tuned.to_json(),
        "held_out": [ours.score, rival.score],
        "held_out_kept": [ours.kept, rival.kept],
        "seconds": round(seconds, 3),
    }


def answered_pairs(bench: Bench, groups: str) -> dict[str, dict[str, Any]]:
    """By pair: utility of the answer, of the tuned merge whether or not it is the answer, and of the choice."""
    chosen, kept = bench.kept("chosen"), bench.kept("answered")

    def answer(pair: tuple[str, str]) -> dict[str, Any]:
        joined, tasks = "+".join(pair), bench.tasks_of(pair)
        before = chosen.of(f"{joined} 64 probes", lambda: label_free(bench, pair))
        value = kept.of(f"{joined} {groups}, keeping as many", lambda: tuned_answer(bench, pair, before, groups))
        return {
            "utility": bench.utilities.mean(plan_from_json(value["plan"]), tasks),
            "tuned": bench.utilities.mean(plan_from_json(value["tuned"]), tasks),
            "chosen": bench.utilities.mean(ranked_plans(before)[0], tasks),
            "held_out": value["held_out"],
            "seconds": value["seconds"],
        }

    return bench.each(f"answer, {groups}", bench.spread_pairs(), answer)
