"""Units of work, and those that wait for a worker, also those that arrive while others run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from simmerge_ray.base.errors import CheckpointError

_UNIT_ELEMENTS = 1 << 25

Group = tuple[str, str | None, int]  # what is held in memory, of which checkpoint, from which layer on


@dataclass(frozen=True)
class Unit:
    """One piece of work. Units of the same `group` are best run by the same worker, which keeps what they share.

    kind: `continuation` (TokenBatch, number of tokens, stages or None), `outputs` (ProbeBatch), `stage` (LayerRange,
    ProbeBatch, hidden states of the stage before or None), `answers` (TokenBatch, AnswerSpec), `likeliest`
    (AnswerBatch, K), `kept` (AnswerBatch, (S, K) tokens), `kept of merge` (the same, and a ResolvedPlan), `sample`
    (names, coordinates), or `sums` ({name: (M,) thresholds}, elements of a block) over all checkpoints.
    """

    kind: str
    checkpoint: str | None
    payload: tuple[Any, ...]

    @property
    def group(self) -> Group:
        stage = self.payload[0].first if self.kind == "stage" else -1
        return ("weights" if self.kind in ("sample", "sums") else "model", self.checkpoint, stage)


@dataclass(frozen=True)
class UnitFailure:
    """A checkpoint that cannot be used, found while its unit ran; the other checkpoints' units are not concerned."""

    message: str


# Drains a queue: yields (index, result) in any order, until no unit is left; units may be added meanwhile.
Executor = Callable[["WorkQueue"], Iterator[tuple[int, Any]]]


class WorkQueue:
    """Gives each worker units of the group that it holds (its model is then in memory) as long as there are any.

    Then it prefers a group that nobody holds, of the latest stage, then the first, and last the one with the most units
    waiting. Which worker runs a unit changes no result.
    """

    def __init__(self, units: Iterable[Unit] = ()) -> None:
        self.units: list[Unit] = []
        self._waiting: dict[Group, deque[int]] = {}
        self._held: dict[int, Group] = {}
        for unit in units:
            self.add(unit)

    def __len__(self) -> int:
        """Units so far, the finished ones included."""
        return len(self.units)

    def add(self, unit: Unit) -> int:
        """Put a unit at the end of its group; returns its index."""
        self.units.append(unit)
        self._waiting.setdefault(unit.group, deque()).append(len(self.units) - 1)
        return len(self.units) - 1

    def take(self, worker: int = 0) -> tuple[int, Unit] | None:
        """A unit for a worker, or None when none is waiting now."""
        groups = [group for group, indices in self._waiting.items() if indices]
        if not groups:
            return None
        group = self._held.get(worker)
        if group not in groups:
            others = {held for name, held in self._held.items() if name != worker}
            free = [one for one in groups if one not in others]
            # A later stage first: its hidden states wait in memory.
            group = max(free, key=lambda one: one[2]) if free else max(groups, key=lambda one: len(self._waiting[one]))
            self._held[worker] = group
        index = self._waiting[group].popleft()
        if not self._waiting[group]:
            del self._waiting[group]
        return index, self.units[index]

    def forget(self, index: int) -> None:
        """Let go of a finished unit's payload, which may be large."""
        self.units[index] = replace(self.units[index], payload=self.units[index].payload[:1])


def group_tensors(sizes: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Names in order, cut into groups of about 2^25 elements: what one `sample` or `sums` unit reads.

    Args:
        sizes: elements of each tensor.
    """
    groups: list[tuple[str, ...]] = []
    names: list[str] = []
    elements = 0
    for name, size in sizes.items():
        names.append(name)
        elements += size
        if elements >= _UNIT_ELEMENTS:
            groups.append(tuple(names))
            names, elements = [], 0
    return [*groups, tuple(names)] if names else groups


def checked_results(run: Executor, queue: WorkQueue) -> Iterator[tuple[int, Any]]:
    """Results as they come; failures are collected and raised together at the end.

    Raises:
        CheckpointError: with every checkpoint that cannot be used.
    """
    failures: dict[str, None] = {}
    for index, result in run(queue) if len(queue) else ():
        if isinstance(result, UnitFailure):
            failures[result.message] = None
        else:
            yield index, result
    if failures:
        kept = "" if queue.units[0].kind == "sums" else "\n  the signatures of the other checkpoints are kept"
        raise CheckpointError("\n  ".join(sorted(failures)) + kept)
