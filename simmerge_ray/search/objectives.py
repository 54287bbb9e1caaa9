"""What a search maximises: one number from the utilities of a merge on several tasks; with several, a Pareto front."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.errors import ConfigError, unknown_name

MEAN, WORST = "mean", "worst"


@dataclass(frozen=True)
class Objective:
    """`mean` (weighted, if there are weights), `worst` task, or the utility on the one task that has a weight."""

    name: str
    weights: tuple[tuple[str, float], ...] = ()

    def value(self, utilities: Mapping[str, float]) -> float:
        """From utilities by task; those without a weight are left out where there are weights."""
        weights = self.task_weights(utilities)
        return sum(weight * utilities[task] for task, weight in weights.items()) / sum(weights.values())

    def task_weights(self, utilities: Mapping[str, float]) -> dict[str, float]:
        """How much each task counts for the value."""
        if self.name == WORST:
            return {min(sorted(utilities), key=lambda task: utilities[task]): 1.0}
        return dict(self.weights) or dict.fromkeys(utilities, 1.0)

    @property
    def tasks(self) -> tuple[str, ...] | None:
        """The tasks that it needs; None means all."""
        return tuple(task for task, _ in self.weights) or None


def parse_objective(text: str, tasks: Iterable[str]) -> Objective:
    """`mean`, `worst`, a task, or weights `math=2,code=1`.

    Raises:
        ConfigError: it has none of these forms, or names an unknown task.
    """
    known = sorted(tasks)
    if text in (MEAN, WORST):
        return Objective(text)
    weights = []
    for part in text.split(","):
        task, equals, number = (piece.strip() for piece in part.partition("="))
        if task not in known:
            raise ConfigError(f"objective {text!r}: {unknown_name('task', task, [MEAN, WORST, *known])}")
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            weight = -1.0
        if not (0 < weight < float("inf")):
            raise ConfigError(f"objective {text!r}: the weight of {task!r} must be a positive number, got {number!r}")
        weights.append((task, weight))
    if len(dict(weights)) < len(weights):
        raise ConfigError(f"objective {text!r} names a task twice")
    return Objective(text, tuple(weights))


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points, (n, d) and higher is better, that no other is at least as good as in everything and
    better in something."""
    values = np.asarray(points, dtype=np.float64)
    dominated = [((values >= point).all(axis=1) & (values > point).any(axis=1)).any() for point in values]
    return np.flatnonzero(np.logical_not(dominated)).tolist()
