"""From utilities on several tasks to the one number that plans are ranked by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.errors import ConfigError, PlanError, unknown_name
from simmerge_ray.search.objectives import WORST, Objective, parse_objective


@dataclass(frozen=True)
class TaskPool:
    """Tasks (T of them) and how they are pooled: the mean, a weighted mean, or the worst.

    own: (n, T) bool, which tasks each checkpoint was fine-tuned for, where a plan counts on its members' own tasks
    only; None where it counts on all T. A plan that owns none of them counts on all.
    """

    objective: Objective
    tasks: tuple[str, ...]
    own: np.ndarray | None = None

    def counted(self, members: np.ndarray) -> np.ndarray:
        """Which tasks count for plans over members (..., k), -1 for none; (..., T) bool."""
        if self.own is None:
            return np.ones((*members.shape[:-1], len(self.tasks)), bool)
        found = (self.own[members] & (members >= 0)[..., None]).any(-2)
        counted: np.ndarray = found | ~found.any(-1, keepdims=True)
        return counted

    def pooled(self, utility: np.ndarray, sd: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(..., T) utility and sd, and bool or what broadcasts to it -> (...) objective and its spread, assuming that
        the errors of all tasks have one sign."""
        if self.objective.name == WORST:
            place = np.where(counted, utility, np.inf).argmin(-1)[..., None]
            return np.take_along_axis(utility, place, -1)[..., 0], np.take_along_axis(sd, place, -1)[..., 0]
        weights = dict(self.objective.weights)
        shares = counted * np.array([weights.get(task, 1.0) for task in self.tasks])
        shares = shares / shares.sum(-1, keepdims=True)
        return (np.where(counted, utility, 0.0) * shares).sum(-1), (np.where(counted, sd, 0.0) * shares).sum(-1)


def task_pool(
    objective: str, tasks: Sequence[str], known: Sequence[str], ids: Sequence[str], own_task: Mapping[str, str | None]
) -> TaskPool:
    """Checked `TaskPool`.

    Args:
        objective: `mean`, `worst`, a task, or weights `math=2,code=1`. tasks: count on these; none given means the
            members' own tasks, or those that the objective names. known: tasks of the signal table. ids: the n
            checkpoints in the order that plans refer to.

    Raises:
        PlanError: a task without signals. ConfigError: an objective that cannot be read, or that does not fit `tasks`.
    """
    for task in tasks:
        if task not in known:
            raise PlanError(
                f"{unknown_name('task', task, known)}; `simmerge signals --probes DIR` with {task}.jsonl in DIR adds it"
            )
    parsed = parse_objective(objective, tasks or known)
    if parsed.tasks is not None and tasks and set(tasks) != set(parsed.tasks):
        raise ConfigError(f"objective {objective!r} and the tasks {', '.join(tasks)} are not the same tasks; give one")
    if parsed.tasks is not None or tasks:
        return TaskPool(parsed, tuple(sorted(parsed.tasks or set(tasks))))
    own = np.array([[own_task.get(name) == task for task in known] for name in ids]).reshape(len(ids), len(known))
    return TaskPool(parsed, tuple(known), own)
