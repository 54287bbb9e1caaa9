"""`exact` features for a sample of three-way plans: what is left of the error when nothing is propagated.

Merging every intermediate and running the probes on it takes a second or two, so the features of the sample are kept in
a file of each base, and a propagator answers from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from simmerge_ray.base.errors import PlanError
from simmerge_ray.base.storage import read_json, write_json
from simmerge_ray.checkpoints.probes import load_probe_sets
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.research.study.layout import LoadedPart
from simmerge_ray.research.study.longer import candidates
from simmerge_ray.signals.propagation.evidence import read_evidence
from simmerge_ray.signals.propagation.interface import Propagator, SourcePair, plan_sources
from simmerge_ray.signals.propagation.table import PROPAGATORS
from simmerge_ray.signals.signature import SignatureStore
from simmerge_ray.signals.table import SignalTable

SIZE = 3
NUM_SUBSETS = 2  # of each base


def sampled_part(part: LoadedPart) -> LoadedPart:
    """The part with the labels of unmerged checkpoints, and of the plans of its first three-way subsets alone."""
    plans = {plan.id for plan in sampled_plans(part)}
    kept = tuple(label for label in part.labels if not label.plan.is_merge or label.plan.id in plans)
    return replace(part, labels=kept)


def sampled_plans(part: LoadedPart) -> list[MergePlan]:
    """Every labelled fold of the first three-way subsets that have plans of several arms, in the order of ids."""
    of_size = [fold for fold in candidates(part.labels, part.catalogue) if len(fold.plan.members) == SIZE]
    mixed = sorted({fold.group[1] for fold in of_size if fold.arm is None})[:NUM_SUBSETS]
    return [fold.plan for fold in of_size if fold.group[1] in mixed]


def write_exact(part: LoadedPart, probes: Path, path: Path) -> int:
    """Features of the last step of every sampled plan, on its members' tasks, into a JSON file; how many plans."""
    evidence = read_evidence(part.table, part.catalogue, load_probe_sets(probes), SignatureStore(part.signatures))
    exact = PROPAGATORS["exact"](evidence)
    plans, rows = sampled_plans(part), []
    for plan in plans:
        for task in sorted({task for name in plan.members if (task := part.catalogue.own_task[name])}):
            found = exact.steps(plan, task, -1)[0].features
            rows.append({"plan": plan.id, "task": task, "values": [found[column] for column in exact.columns]})
    write_json(path, {"columns": list(exact.columns), "rows": rows})
    return len(plans)


class RecordedExact(Propagator):
    """The propagator `exact`, for the plans of a file of `write_exact`."""

    name = "exact"

    def __init__(self, table: SignalTable, path: Path) -> None:
        content = read_json(path)
        super().__init__(table, tuple(content["columns"]))
        self._known: Mapping[tuple[str, str], dict[str, Any]] = {
            (row["plan"], row["task"]): dict(zip(self.columns, row["values"], strict=True)) for row in content["rows"]
        }

    def _features(self, pairs: Sequence[SourcePair], columns: Sequence[str], num_threads: int) -> np.ndarray:
        rows = []
        for pair in pairs:
            known = self._known.get((pair.plan.id, pair.task))
            if known is None or plan_sources(pair.plan)[-1] != (pair.left, pair.right):
                raise PlanError(f"the features of {pair.plan.label} on {pair.task} were not recorded")
            rows.append([known[column] for column in columns])
        return np.array(rows).T
