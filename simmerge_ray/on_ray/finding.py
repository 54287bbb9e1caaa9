"""Answers, and candidates run over them, on actors of a cluster that starts when the first of them is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.progress import Report
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.on_ray.merge_search import run_search
from simmerge_ray.on_ray.resources import ray_session
from simmerge_ray.on_ray.signal_actors import ray_executor
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.search.estimate import PROCESS_BYTES
from simmerge_ray.search.evaluation.answers import AnswersTask
from simmerge_ray.search.setup import PreparedSearch, grid_trials, prepare_search
from simmerge_ray.selector.finding.probed import RunTrials
from simmerge_ray.signals.bounds import held_bytes
from simmerge_ray.signals.queue import Executor, WorkQueue
from simmerge_ray.signals.signature import SignatureSpec


class ClusterOnDemand:
    """A Ray cluster that is started, or connected to, when the first unit or trial is missing, and kept to the end of
    the block: a run that finds everything in place starts none."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._workers = ExitStack()  # of units, kept from one round of them to the next
        self._started = False

    def __enter__(self) -> ClusterOnDemand:
        return self

    def __exit__(self, *error: Any) -> None:
        self._workers.close()
        self._stack.__exit__(*error)

    def start(self) -> None:
        """Start it, if it is not there. Actors that run units end: what follows needs their place."""
        self._workers.close()
        if not self._started:
            self._stack.enter_context(ray_session())
            self._started = True

    def executor(self, catalogue: Catalogue, num_workers: int, gpus: float, report: Report | None = None) -> Executor:
        """Runs units of signatures on actors, which stay until `start`. gpus: share of a GPU for each."""
        held = held_bytes(catalogue.checkpoints[0], SignatureSpec(), None)
        worker_bytes = held + (0 if gpus else PROCESS_BYTES["transformers"])
        kept: list[Executor] = []

        def run(queue: WorkQueue) -> Iterator[tuple[int, Any]]:
            if not kept:
                self.start()
                actors = ray_executor(catalogue, num_workers, gpus, report, worker_bytes)
                kept.append(self._workers.enter_context(actors))
                self._workers.callback(kept.clear)
            yield from kept[0](queue)

        return run

    def trials(
        self,
        config: SearchConfig,
        labels_uri: str,
        shown: Callable[[], Any],
    ) -> RunTrials:
        """Runs candidates as trials of a search. shown: opens a progress bar, a context of a report."""

        def run(catalogue: Catalogue, tasks: Mapping[str, AnswersTask], plans: Sequence[MergePlan]) -> PreparedSearch:
            search = prepare_search(catalogue, tasks, config, labels_uri, plans_given=True)
            if grid_trials(search, plans):
                self.start()
            with shown() as report:
                return run_search(catalogue, tasks, config, labels_uri, plans, report).search

        return run
