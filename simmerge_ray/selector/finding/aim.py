"""One number from what a candidate keeps of every owner of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.search.objectives import WORST, Objective
from simmerge_ray.signals.candidates.signatures import Owner


def worth(retention: np.ndarray, nll: np.ndarray) -> np.ndarray:
    """`(retention + exp(-nll)) / 2`, in [0, 1]: the share of the answers that are given as well, which is what counts,
    with the mean probability of an answer's token, which tells apart candidates that keep as many.

    Args:
        retention: in [0, 1]. nll: nats a token.
    """
    return 0.5 * (np.asarray(retention) + np.exp(-np.asarray(nll)))


@dataclass(frozen=True)
class Aim:
    """What is wanted.

    owners: whose answers are looked at. base: id of the base; its answers to the general probes only bound the choice.
    objective: over tasks. Members of one task share it: its value is their mean, since without labels none of them is
    known to be the better one. forget: share of the base's answers that may be lost; None for any.
    """

    owners: tuple[Owner, ...]
    base: str
    objective: Objective
    forget: float | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Sorted; without the base's general probes."""
        return tuple(sorted({owner.task for owner in self.owners if owner.checkpoint != self.base}))

    def by_task(self, values: np.ndarray) -> np.ndarray:
        """(N, T) from (N, owners), in the order of `tasks`."""
        return np.stack([values[:, self._of_task(task)].mean(1) for task in self.tasks], 1)

    def scores(self, retention: np.ndarray, nll: np.ndarray) -> np.ndarray:
        """(N,): the objective of `worth`; -inf for what forgets too much.

        Args:
            retention, nll: (N, owners).
        """
        found = self.pooled(worth(retention, nll))
        if self.forget is not None:
            kept = retention[:, [place for place, owner in enumerate(self.owners) if owner.checkpoint == self.base]]
            found = np.where((kept >= 1.0 - self.forget - 1e-12).all(1), found, -np.inf)
        return np.asarray(found)

    def pooled(self, values: np.ndarray) -> np.ndarray:
        """(N,): the objective over tasks of values (N, owners)."""
        of_task = self.by_task(values)
        if self.objective.name == WORST:
            return np.asarray(of_task.min(1))
        shares = dict(self.objective.weights) or dict.fromkeys(self.tasks, 1.0)
        weights = np.array([shares.get(task, 0.0) for task in self.tasks])
        return np.asarray(of_task @ (weights / weights.sum()))

    def _of_task(self, task: str) -> Sequence[int]:
        return [n for n, owner in enumerate(self.owners) if owner.task == task and owner.checkpoint != self.base]
