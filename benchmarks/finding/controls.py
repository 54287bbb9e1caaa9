"""What a sceptic asks of tuning: RegMean from the same probes, and the merge distilled with all weights free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
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

EVERY = 6  # of the pairs that are distilled, at three learning rates each


def regmean_pairs(bench: Bench) -> dict[str, dict[str, float]]:
    """By pair, of all pairs."""
    batches = tokenize_probes(bench.catalogue, bench.probes, SignatureSpec(), SETTINGS["max_tokens"])
    jobs = gram_jobs(bench.catalogue, batches, SETTINGS["max_tokens"], bench.cache / "grams")
    for job in jobs:
        write_grams(job)
    catalogue = with_grams(bench.catalogue, jobs)

    def measured(pair: tuple[str, str]) -> dict[str, float]:
        plan = MergePlan(recipe=recipe_of(make_arm("regmean"), dict.fromkeys(pair, 0.5)))

        def tensors() -> Iterator[tuple[str, Tensor]]:
            return merged_tensors(resolve_plan(plan, catalogue))

        key = f"regmean {'+'.join(pair)}"
        return {"utility": bench.utilities.mean_of_weights(key, tensors, bench.tasks_of(pair))}

    return bench.each("regmean", bench.pairs(), measured)


def distilled_pairs(bench: Bench) -> dict[str, dict[str, float]]:
    """By pair, of every sixth: the objective and probes of a tuning, all weights free, twice as many steps."""
    config = TuneConfig(**SETTINGS | {"num_steps": 60, "patience": 20})

    def measured(pair: tuple[str, str]) -> dict[str, float]:
        def tensors() -> Iterator[tuple[str, Tensor]]:
            with torch.enable_grad():  # who puts tensors into a model has it off
                found = distilled(bench.catalogue, pair, bench.probes, config)
            yield from found.items()

        key = f"distilled {'+'.join(pair)}"
        return {"utility": bench.utilities.mean_of_weights(key, tensors, bench.tasks_of(pair))}

    return bench.each("distilled", bench.pairs()[::EVERY], measured)


def control_figures(bench: Bench) -> dict[str, Any]:
    return {"regmean": regmean_pairs(bench), "distilled, all weights free": distilled_pairs(bench)}
