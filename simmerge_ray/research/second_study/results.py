"""Labels and choices of the real zoo as they are published: what is read by the analysis of docs/study-2.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simmerge_ray.base.errors import LabelError
from simmerge_ray.base.storage import digest_file, new_directory, read_json, write_atomically, write_json
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.plans.plan import MergePlan, plan_from_json
from simmerge_ray.research.choosing import PairItems
from simmerge_ray.research.second_study.real_labels import fixed_candidates
from simmerge_ray.search.evaluation.answers import PREFIX
from simmerge_ray.search.labels import LabelStore, Measured, check_comparable
from simmerge_ray.selector.data.splits import Pair
from simmerge_ray.selector.predictor.answers import NOTES
from simmerge_ray.selector.predictor.rows import CandidateRows, read_candidates
from simmerge_ray.selector.predictor.signals import COLUMNS

CHOSEN = "chosen"
LEFT, RIGHT, BASE = "left parent", "right parent", "base"


@dataclass(frozen=True)
class RealPair:
    """A pair whose fixed candidates and choice are all labelled.

    items: utilities of the items of both tasks, by the names of `named_plans` and of `CHOSEN`. scores: (retention +
    exp(-nll)) / 2 on each task's probes, by the former names. chosen: the plan.
    """

    pair: Pair
    items: PairItems
    scores: Mapping[str, Mapping[str, float]]
    chosen: MergePlan

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.items[CHOSEN])


@dataclass(frozen=True)
class RealResults:
    """pairs: those that are whole. num_pairs: of the zoo. singles: mean utility of every checkpoint and the base, by
    task."""

    pairs: tuple[RealPair, ...]
    num_pairs: int
    singles: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class PublishedResults:
    """The directory `docs/study/second`."""

    root: Path

    def inputs(self) -> dict[str, str]:
        """Digests of labels and choices."""
        return {"labels": LabelStore(self.root / "labels").digest(), "choices": digest_file(self.root / "choices.json")}


def read_results(directory: Path) -> RealResults:
    """What `publish_results` wrote.

    Raises:
        LabelError: labels that must not be compared, or no pair that is whole.
    """
    content = read_json(directory / "choices.json")
    measured = _measured_items(directory / "labels")
    own_task, base, scores = content["own_task"], content["base"], _scores(read_candidates([directory / "labels"]))
    pairs = []
    for row in content["pairs"]:
        left, right = row["pair"]
        named = named_plans(left, right, base) | {CHOSEN: plan_from_json(row["plan"])}
        tasks = [own_task[left], own_task[right]]
        found = {name: measured.get(plan, {}) for name, plan in named.items()}
        if all(task in items for items in found.values() for task in tasks):
            items = {name: {task: of_task[task] for task in tasks} for name, of_task in found.items()}
            scored = {
                name: {task: scores[left, right, task, plan] for task in tasks}
                for name, plan in named.items()
                if name != CHOSEN
            }
            pairs.append(RealPair((left, right), items, scored, named[CHOSEN]))
    if not pairs:
        raise LabelError(f"no pair in {directory} has labels of all its fixed candidates and of what was chosen")
    singles = {
        name: {task: float(items.mean()) for task, items in measured.get(MergePlan(source=name), {}).items()}
        for name in (base, *own_task)
    }
    return RealResults(tuple(pairs), content["num_pairs"], singles)


def publish_results(
    directory: Path, labels: Path, catalogue: Catalogue, choices: Mapping[Pair, tuple[MergePlan, Mapping[str, float]]]
) -> int:
    """Publish labels, as one file with their notes, and choices (plan, and what it keeps of each member); the number of
    labels."""
    assert catalogue.base is not None
    pairs = [
        {"pair": list(pair), "plan": plan.to_json(), "keeps": dict(keeps)} for pair, (plan, keeps) in choices.items()
    ]
    own_task = dict(catalogue.own_task)
    content = {"base": catalogue.base.id, "own_task": own_task, "num_pairs": len(catalogue.pairs()), "pairs": pairs}
    with new_directory(directory) as made:
        write_json(made / "choices.json", content)
        store = LabelStore(made / "labels")
        store.append(LabelStore(labels).read())
        for path in sorted((labels / NOTES).iterdir()):
            write_atomically(made / "labels" / NOTES / path.name, path.read_bytes())
    return len(LabelStore(directory / "labels").read())


def measured_means(labels: Path) -> dict[MergePlan, dict[str, float]]:
    """Utility by task of all that was measured."""
    return {
        plan: {task: float(items.mean()) for task, items in sorted(of_task.items())}
        for plan, of_task in _measured_items(labels).items()
    }


def _measured_items(labels: Path) -> dict[MergePlan, dict[str, np.ndarray]]:
    """Utilities of the items by plan and task. Raises LabelError: labels that must not be compared."""
    of_items = [one for one in LabelStore(labels).read() if not one.task.startswith(PREFIX)]
    check_comparable(of_items)
    measured: dict[MergePlan, dict[str, np.ndarray]] = {}
    for one in of_items:
        if isinstance(one.outcome, Measured):
            measured.setdefault(one.plan, {})[one.task] = one.outcome.items
    return measured


def named_plans(left: str, right: str, base: str) -> dict[str, MergePlan]:
    """The fixed candidates, both parents and the base."""
    kept = {LEFT: left, RIGHT: right, BASE: base}
    return fixed_candidates(left, right) | {name: MergePlan(source=one) for name, one in kept.items()}


def _scores(rows: CandidateRows) -> dict[tuple[str, str, str, MergePlan], float]:
    """By both members, in either order, task and plan."""
    retention, likelihood = (rows.features[:, COLUMNS.index(name)] for name in ("retention", "likelihood"))
    found = {}
    for members, task, plan, score in zip(
        rows.members, rows.tasks, rows.plans, (retention + likelihood) / 2, strict=True
    ):
        if len(members) == 2:
            left, right = members
            found[left, right, task, plan] = found[right, left, task, plan] = float(score)
    return found
