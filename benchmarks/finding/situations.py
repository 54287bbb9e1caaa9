"""Where a choice could go wrong: more members, members of one task, one that is much better, broken, or the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import qmc

from benchmarks.finding.candidates import BASE_ID
from benchmarks.finding.choices import chosen_pairs
from benchmarks.finding.derived import BROKEN, COPY, HALF
from benchmarks.finding.utilities import HALVES, Bench
from simmerge_ray.plans.operators.specs import make_arm
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.plans.recipe import plain_average, recipe_of
from simmerge_ray.research.pair_sample import PairSample

Groups = Sequence[tuple[str, ...]]
_NUM_REFERENCE = 40  # sums of task vectors that stand for what an oracle could choose
_NUM_GROUPS = {3: 8, 4: 6}


def one_task(bench: Bench) -> Groups:
    """All pairs of members of one task."""
    return bench.pairs(same_task=True)


def with_odd_one(derived: Bench, kind: str) -> Groups:
    """Every member of the zoo with the odd one of the next task: broken, or a copy of the base."""
    tasks = sorted(derived.tasks)
    zoo = [name for name in derived.catalogue.ids if not name.startswith((BROKEN, COPY, HALF))]
    return [(name, f"{kind}-{tasks[(tasks.index(derived.task_of(name)) + 1) % len(tasks)]}") for name in zoo]


def half_as_good(derived: Bench, same_task: bool) -> Groups:
    """A strong fine-tune with one half as good, of its task or of each other task."""
    tasks = sorted(derived.tasks)
    return [(f"{a}-strong", f"{HALF}-{b}") for a in tasks for b in tasks if (a == b) == same_task]


def several(bench: Bench, size: int) -> Groups:
    """Groups of members of different tasks, a random part of all of them."""
    groups = [one for one in combinations(bench.catalogue.ids, size) if len(bench.tasks_of(one)) == size]
    drawn = np.random.default_rng(size).choice(len(groups), _NUM_GROUPS[size], replace=False)
    return [groups[place] for place in sorted(drawn)]


def references(bench: Bench, members: Sequence[str]) -> dict[str, float]:
    """What one would have without a choice, on all items of the members' tasks."""
    tasks = bench.tasks_of(members)
    singles = {name: bench.utilities.mean(MergePlan(source=name), tasks) for name in members}
    return {
        "plain average": bench.utilities.mean(MergePlan(recipe=plain_average(members)), tasks),
        "best member, in hindsight": max(singles.values()),
        "base": bench.utilities.mean(MergePlan(source=BASE_ID), tasks),
    }


def oracle_of_group(bench: Bench, members: Sequence[str]) -> float:
    """Split-half, over spread sums of task vectors, the plain average, all members and the base."""
    tasks = bench.tasks_of(members)
    points = qmc.Sobol(len(members), seed=0).random(_NUM_REFERENCE)
    plans = [
        MergePlan(
            recipe=recipe_of(make_arm("task_arithmetic"), dict(zip(members, np.round(row, 3).tolist(), strict=True)))
        )
        for row in points
    ]
    plans += [MergePlan(recipe=plain_average(members)), *(MergePlan(source=name) for name in (*members, BASE_ID))]
    by_half = np.array([[bench.utilities.mean(plan, tasks, half) for half in HALVES] for plan in plans])
    return float(np.mean([by_half[by_half[:, half].argmax(), 1 - half] for half in HALVES]))


def situation(bench: Bench, groups: Groups, with_oracle: bool = False) -> dict[str, Any]:
    """Choices in groups of members beside the references."""
    chosen = chosen_pairs(bench, groups)

    def row_of(members: tuple[str, ...]) -> dict[str, Any]:
        row = {"members": list(members), **chosen["+".join(members)], **references(bench, members)}
        return row | ({"split-half oracle": oracle_of_group(bench, members)} if with_oracle else {})

    done = [members for members in groups if "+".join(members) in chosen]
    rows = list(bench.each("references", done, row_of).values())
    names = ["utility", "plain average", "best member, in hindsight", "base", *(["split-half oracle"] * with_oracle)]
    means: Mapping[str, float] = {name: float(np.mean([row[name] for row in rows])) for name in names} if rows else {}
    return {"mean": means, "rows": rows}


def with_intervals(pairs: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Gains of the choice in pairs, with intervals over checkpoints."""
    sample = PairSample(tuple(pairs))
    return {
        name: sample.mean([row["utility"] - row[name] for row in rows])
        for name in ("plain average", "best member, in hindsight", "base")
    }
