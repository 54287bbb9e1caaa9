"""What a selector knows of the task beyond the signals, which are computed on the task's probes already.

none         nothing (the default: an encoding can only be wrong about a task that was not trained on)
onehot       one column for each known task, and one for an unknown task
probe_stats  entropy and loss of the context's base on the task's probes, standardised over bases and tasks of the
             training; the length of the probes is not in a signal table, so it is not used
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.errors import SelectorError
from simmerge_ray.signals.table import SignalTable

KINDS = ("none", "onehot", "probe_stats")
STATISTICS = ("entropy", "loss")


@dataclass(frozen=True)
class TaskEncoding:
    """How a task becomes numbers.

    kind: `none`, `onehot` or `probe_stats`. tasks: known ones, in the order of their columns. centre, scale: of the
    statistics, (S,), empty for the other kinds.
    """

    kind: str = "none"
    tasks: tuple[str, ...] = ()
    centre: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    @staticmethod
    def fit(kind: str, tasks: Sequence[str], statistics: np.ndarray | None = None) -> TaskEncoding:
        """The encoding of the tasks of a training set, one entry a context. statistics: (N, S), of the base of each
        context on its task. Raises SelectorError: `probe_stats` without statistics."""
        known = tuple(sorted(set(tasks)))
        if kind != "probe_stats":
            return TaskEncoding(kind, known if kind == "onehot" else ())
        values = np.unique(_checked(statistics, len(tasks)), axis=0)  # of every base and task once
        scale = np.where(values.std(0) > 1e-9, values.std(0), 1.0)
        return TaskEncoding(kind, known, tuple(values.mean(0).tolist()), tuple(scale.tolist()))

    @property
    def width(self) -> int:
        """Number of columns."""
        return {"none": 0, "onehot": len(self.tasks) + 1, "probe_stats": len(self.centre)}[self.kind]

    def codes(
        self, num_contexts: int, tasks: Sequence[str] | None = None, statistics: np.ndarray | None = None
    ) -> np.ndarray:
        """(N, T) columns for the tasks of N contexts; without `tasks` every task is unknown. Raises SelectorError: the
        number of tasks is another one, or `probe_stats` lacks statistics."""
        if tasks is not None and len(tasks) != num_contexts:
            raise SelectorError(f"{len(tasks)} tasks were given for {num_contexts} contexts; give one for each")
        if self.kind == "none":
            return np.zeros((num_contexts, 0))
        if self.kind == "onehot":
            codes: np.ndarray = np.zeros((num_contexts, len(self.tasks) + 1))
            columns = [self.tasks.index(t) if t in self.tasks else -1 for t in tasks or [""] * num_contexts]
            codes[np.arange(num_contexts), columns] = 1.0
            return codes
        standardised: np.ndarray = (_checked(statistics, num_contexts) - self.centre) / self.scale
        return standardised


def statistics_of(table: SignalTable, tasks: Sequence[str]) -> np.ndarray | None:
    """(N, S): entropy and loss of the base on the probes of each context's task, in nats, from its pairs in the table.

    None where the table was made without a base.
    """
    base = table.provenance.get("base")
    if base is None:
        return None
    known = {task: table.rows[base, table.checkpoint_ids[0], task].features for task in set(tasks)}
    rows = [[known[task][f"{name}_left"] for name in STATISTICS] for task in tasks]
    return np.array(rows).reshape(len(tasks), len(STATISTICS))


def _checked(statistics: np.ndarray | None, num_contexts: int) -> np.ndarray:
    if statistics is None:
        raise SelectorError(
            f"the task encoding probe_stats needs the base's {' and '.join(STATISTICS)} on the task of every context, "
            "which signals computed without a base lack: name a base in the catalogue, or take task_encoding none"
        )
    if statistics.shape != (num_contexts, len(STATISTICS)):
        raise SelectorError(f"the statistics have the shape {statistics.shape}; it must be ({num_contexts}, 2)")
    return statistics
