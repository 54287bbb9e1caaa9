"""Merges of every pair of a small zoo: what each keeps of both members, and its utility on their tasks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

from simmerge_ray.checkpoints.catalogue import Catalogue, load_catalogue
from simmerge_ray.checkpoints.probes import Probe, ProbeSet
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import Recipe
from simmerge_ray.research.labelling import TeacherForcedTask, measure_plans, tokenizer_of
from simmerge_ray.research.zoo.domains import evaluation_items, probe_texts

NUM_ITEMS, NUM_PROBES = 200, 64
_LEVELS = (0.3, 0.5, 0.7, 1.0)  # of a member's weight in a sum of task vectors
_DENSITIES, _SCALES = (0.1, 0.3), (0.7, 1.0, 1.4)  # of ties
_RATIOS = ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0))  # of norm-matched weights


def pair_candidates(left: str, right: str) -> list[MergePlan]:
    """Sums over a grid of weights, ties, and norm-matched weights."""
    pair = (left, right)
    sums = [Recipe(make_arm("task_arithmetic"), pair, weights) for weights in product(_LEVELS, repeat=2)]
    ties = [
        Recipe(make_arm("ties", {"density": density, "scale": scale}), pair, (1.0, 1.0))
        for density, scale in product(_DENSITIES, _SCALES)
    ]
    matched = [Recipe(make_arm("scale_matched_linear"), pair, ratio) for ratio in _RATIOS]
    return [MergePlan(recipe=one) for one in (*sums, *ties, *matched)]


def measure_zoo(
    zoo: Path, labels: Path, num_items: int = NUM_ITEMS, report: Callable[[int, int], None] | None = None
) -> None:
    """Fill a label store with the candidates of all cross-task pairs of the catalogue in `zoo`, and all checkpoints.
    What it holds is not measured again."""
    catalogue = load_catalogue(zoo / "catalogue.yaml")
    tasks = sorted({task for task in catalogue.own_task.values() if task})
    probe_sets = {task: ProbeSet(task, tuple(map(Probe, probe_texts(task, NUM_PROBES)))) for task in tasks}
    singles = [MergePlan(source=ref.id) for ref in catalogue.all_refs]
    plans = [*singles, *(plan for pair in catalogue.pairs() for plan in pair_candidates(*pair))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        evaluated = {task: _task(catalogue, task, num_items) for task in tasks}
        measure_plans(catalogue, evaluated, probe_sets, labels, plans, report)
    finally:
        torch.set_num_threads(threads)


def _task(catalogue: Catalogue, domain: str, num_items: int) -> TeacherForcedTask:
    tokenizer, pairs = tokenizer_of(catalogue), []
    for item in evaluation_items(domain, num_items):
        target = tokenizer(item.target, add_special_tokens=False)["input_ids"]
        pairs.append((tokenizer(item.prompt)["input_ids"], [*target, tokenizer.eos_token_id]))
    return TeacherForcedTask(domain, pairs)
