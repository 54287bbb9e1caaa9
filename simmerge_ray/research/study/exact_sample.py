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
from simmerge_ray.signals.propagation.interface import PlanStep, plan_sources
from simmerge_ray.signals.propagation.table import PROPAGATORS
from simmerge_ray.signals.signature import SignatureStore
from simmerge_ray.signals.table import PairSignals, SignalTable

SIZE = 3
NUM_SUBSETS = 2  # of each base


def sampled_part(part: LoadedPart) -> LoadedPart:
    """The part with the labels of unmerged checkpoints, and of the plans of its first three-way subsets alone."""
    plans = {plan.id for plan in sampled_plans(part)}
    kept = tuple(label for label in part.labels if not label.plan.steps or label.plan.id in plans)
    return replace(part, labels=kept)


def sampled_plans(part: LoadedPart) -> list[MergePlan]:
    """Every labelled fold of the first three-way subsets that have plans of several arms, in the order of ids."""
    of_size = [one for one in candidates(part.labels, part.catalogue) if len(one.plan.members) == SIZE]
    mixed = sorted({one.group[1] for one in of_size if one.arm is None})[:NUM_SUBSETS]
    return [one.plan for one in of_size if one.group[1] in mixed]


def write_exact(part: LoadedPart, probes: Path, path: Path) -> int:
    """Compute the features of the last step of every sampled plan, on its members' tasks, into a JSON file.

    Returns:
        the number of plans.
    """
    evidence = read_evidence(part.table, part.catalogue, load_probe_sets(probes), SignatureStore(part.signatures))
    exact = PROPAGATORS["exact"](evidence)
    plans, rows = sampled_plans(part), []
    for plan in plans:
        for task in sorted({task for name in plan.members if (task := part.catalogue.own_task[name])}):
            found = exact.steps(plan, task, -1)[0].features
            rows.append({"plan": plan.id, "task": task, "values": [found[column] for column in exact.columns]})
    write_json(path, {"columns": list(exact.columns), "rows": rows})
    return len(plans)


class RecordedExact:
    """The propagator `exact`, for the plans of a file of `write_exact`."""

    name = "exact"

    def __init__(self, table: SignalTable, path: Path) -> None:
        content = read_json(path)
        self._table = table
        self.columns = tuple(content["columns"])
        self._known: Mapping[tuple[str, str], dict[str, Any]] = {
            (row["plan"], row["task"]): dict(zip(self.columns, row["values"], strict=True)) for row in content["rows"]
        }

    def steps(self, plan: MergePlan, task: str, first: int = 0) -> list[PairSignals]:
        numbers = range(len(plan.steps))[first:]
        return [
            PairSignals(plan.steps[n].left, plan.steps[n].right, task, self._features(PlanStep(plan, n, task)))
            for n in numbers
        ]

    def batch(self, steps: Sequence[PlanStep], columns: Sequence[str], num_threads: int) -> np.ndarray:
        found = [self._features(step) for step in steps]
        return np.array([[features[column] for features in found] for column in columns])

    def _features(self, step: PlanStep) -> Mapping[str, float]:
        left, right = plan_sources(step.plan)[step.number]
        if isinstance(left, str) and isinstance(right, str):
            return self._table.get(left, right, step.task).features
        if step.number < len(step.plan.steps) - 1 or (step.plan.id, step.task) not in self._known:
            raise PlanError(f"the features of {step.plan.label} on {step.task} were not recorded")
        return self._known[step.plan.id, step.task]
