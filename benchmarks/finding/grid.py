"""The fixed grid of every pair: measured on all items, probed on 64 probes a member; the reference of all choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.finding.candidates import fixed_grid
from benchmarks.finding.probing import SIGNALS, Probing
from benchmarks.finding.utilities import HALVES, Bench
from simmerge_ray.plans.plan import MergePlan


@dataclass(frozen=True)
class GridPair:
    """One pair's candidates.

    utility: (N, 2) by half of the items, mean over the pair's tasks. by_task: (N, T) on all items. signals: (N,) by
    name, means over members. by_member: (N, T) by name.
    """

    pair: tuple[str, str]
    names: tuple[str, ...]
    plans: tuple[MergePlan, ...]
    utility: np.ndarray
    by_task: np.ndarray
    by_member: dict[str, np.ndarray]

    @property
    def mean(self) -> np.ndarray:
        """(N,) utilities on all items."""
        return self.by_task.mean(1)

    def signal(self, name: str) -> np.ndarray:
        """(N,), the higher the better."""
        return SIGNALS[name] * self.by_member[name].mean(1)


def measured_pair(bench: Bench, probing: Probing, pair: tuple[str, str], num_probes: int | None = None) -> GridPair:
    """All candidates of a pair, from what is kept where it is there."""
    named = fixed_grid(*pair)
    tasks = bench.tasks_of(pair)
    plans = tuple(named.values())
    by_half = [[bench.utilities.mean(plan, tasks, half) for half in HALVES] for plan in plans]
    by_task = [[bench.utilities.mean(plan, [bench.task_of(one)]) for one in pair] for plan in plans]
    each = [[probing.means(plan, [member], num_probes) for member in pair] for plan in plans]
    by_member = {name: np.array([[one[name] for one in of_plan] for of_plan in each]) for name in SIGNALS}
    return GridPair(pair, tuple(named), plans, np.array(by_half), np.array(by_task), by_member)


def measured_grid(bench: Bench, pairs: Sequence[tuple[str, str]], general: bool = False) -> list[GridPair]:
    """All pairs that time is left for."""
    probing = Probing(bench, general)
    return list(bench.each("grid", pairs, lambda pair: measured_pair(bench, probing, pair)).values())
