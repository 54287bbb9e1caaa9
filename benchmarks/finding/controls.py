"""What a sceptic asks of tuning: RegMean from the same probes, and the merge distilled with all weights free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from benchmarks.finding.tuned import SETTINGS
from benchmarks.finding.utilities import Bench
from benchmarks.tuning.distilled import distilled
from simmerge_ray.base.config import TuneConfig
from simmerge_ray.merging.in_memory import merged_tensors
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan, resolve_plan
from simmerge_ray.plans.recipe import recipe_of
from simmerge_ray.signals.signature import SignatureSpec
from simmerge_ray.signals.tokens import tokenize_probes
from simmerge_ray.signals.tuning.grams import gram_jobs, with_grams, write_grams

EVERY = 3  # of the pairs that are distilled, at three learning rates each


def regmean_pairs(bench: Bench) -> dict[str, dict[str, float]]:
    """By pair, of all pairs."""
    batches = tokenize_probes(bench.catalogue, bench.probes, SignatureSpec(), SETTINGS["max_tokens"])
    jobs = gram_jobs(bench.catalogue, batches, SETTINGS["max_tokens"], bench.cache / "grams")
    for job in jobs:
        write_grams(job)
    catalogue, found = with_grams(bench.catalogue, jobs), {}
    for pair in bench.pairs():
        plan = MergePlan(recipe=recipe_of(make_arm("regmean"), dict.fromkeys(pair, 0.5)))
        key = f"regmean {'+'.join(pair)}"
        utility = bench.utilities.mean_of_weights(
            key, lambda plan=plan: merged_tensors(resolve_plan(plan, catalogue)), bench.tasks_of(pair)
        )
        found["+".join(pair)] = {"utility": utility}
    return found


def distilled_pairs(bench: Bench) -> dict[str, dict[str, float]]:
    """By pair, of every third pair: the same objective, probes and steps as a tuning, all weights free."""
    config, found = TuneConfig(**SETTINGS), {}
    for pair in bench.pairs()[::EVERY]:

        def tensors(pair: tuple[str, str] = pair) -> Iterator[tuple[str, Tensor]]:
            yield from distilled(bench.catalogue, pair, bench.probes, config).items()

        key = f"distilled {'+'.join(pair)}"
        found["+".join(pair)] = {"utility": bench.utilities.mean_of_weights(key, tensors, bench.tasks_of(pair))}
        bench.report(f"{key} {found['+'.join(pair)]['utility']:.3f}")
    return found


def control_figures(bench: Bench) -> dict[str, Any]:
    return {"regmean": regmean_pairs(bench), "distilled, all weights free": distilled_pairs(bench)}
