"""Tuned merges of every pair: coefficients by gradient on the members' answers, at several granularities, and controls.

No label is used. The recipes and their seconds are kept, then measured like any other plan.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.finding.utilities import Bench
from simmerge_ray.base.config import TuneConfig
from simmerge_ray.plans.plan import MergePlan, plan_from_json
from simmerge_ray.signals.signature import SignatureSpec
from simmerge_ray.signals.tokens import tokenize_probes
from simmerge_ray.signals.tuning.prepare import prepare_tuning
from simmerge_ray.signals.tuning.tuner import tune_coefficients

# Written out, so that results are those of these settings whatever the defaults become.
SETTINGS: dict[str, Any] = {
    "num_steps": 30,
    "pull": 0.05,
    "held_out": 0.25,
    "patience": 4,
    "max_tokens": 16,
}
TUNINGS: Mapping[str, Mapping[str, Any]] = {
    "tensor": {"groups": "tensor", "objective": "kl"},
    "layer": {"groups": "layer", "objective": "kl"},
    "two scalars": {"groups": "global", "objective": "kl"},
    "tensor, entropy": {"groups": "tensor", "objective": "entropy"},
    "tensor, nll": {"groups": "tensor", "objective": "nll"},
    "layer, entropy": {"groups": "layer", "objective": "entropy"},
}


def tuned_plan(bench: Bench, members: tuple[str, ...], config: TuneConfig) -> dict[str, Any]:
    """The recipe as JSON, steps, objectives at the start and at the end, and seconds."""
    began = time.perf_counter()
    catalogue = replace(bench.catalogue, checkpoints=tuple(map(bench.catalogue.ref, members)))
    probes = {task: bench.probes[task] for task in bench.tasks_of(members)}
    batches = tokenize_probes(catalogue, probes, SignatureSpec(), config.max_tokens)
    prepared = prepare_tuning(catalogue, batches, config)
    ready = time.perf_counter()
    state = tune_coefficients(prepared.model, prepared.batches, prepared.start, config)
    return {
        "plan": MergePlan(recipe=prepared.recipe(state.best)).to_json(),
        "steps": state.num_steps,
        "best_step": state.best_step,
        "objectives": [state.objectives[0], state.objectives[state.best_step]],
        "seconds": [round(ready - began, 3), round(time.perf_counter() - ready, 3)],
    }


def tuned_pairs(bench: Bench, names: Sequence[str] = tuple(TUNINGS)) -> dict[str, dict[str, dict[str, Any]]]:
    """By tuning and pair: what `tuned_plan` gives, and the measured utility."""
    kept = bench.kept("tuned")

    def tune(name: str, pair: tuple[str, str]) -> dict[str, Any]:
        settings = {**SETTINGS, **TUNINGS[name]}
        key = f"{'+'.join(pair)} {json.dumps(settings)}"
        tuned: dict[str, Any] = kept.of(key, lambda: tuned_plan(bench, pair, TuneConfig(**settings)))
        return tuned | {"utility": bench.utilities.mean(plan_from_json(tuned["plan"]), bench.tasks_of(pair))}

    return {name: bench.each(f"tuned, {name}", bench.spread_pairs(), partial(tune, name)) for name in names}
