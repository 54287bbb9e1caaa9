"""Labels and choices of the second study's zoos as they are published: what the analysis of docs/study-2.md reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simmerge_ray.base.errors import LabelError
from simmerge_ray.base.storage import digest_file, new_directory, read_json, write_atomically, write_json
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.plans.plan import MergePlan, plan_from_json
from simmerge_ray.research.choosing import PairItems
from simmerge_ray.research.second_study.candidates import fixed_candidates
from simmerge_ray.search.evaluation.answers import PREFIX
from simmerge_ray.search.labels import LabelStore, Measured, check_comparable
from simmerge_ray.selector.data.splits import Group
from simmerge_ray.selector.predictor.answers import NOTES
from simmerge_ray.selector.predictor.rows import CandidateRows, read_candidates
from simmerge_ray.selector.predictor.signals import COLUMNS

SETS = "sets"
ZOOS = ("real", "small", SETS)
CHOSEN, TUNED_PLAN, ANSWER = "chosen", "tuned", "answer"
LEFT, RIGHT, BASE = "left parent", "right parent", "base"

NamedPlans = Callable[[Group, str], Mapping[str, MergePlan]]
"""By name, what is labelled of some members and their base beside what was chosen."""


@dataclass(frozen=True)
class Chosen:
    """What was chosen for a pair or a larger set without a label: the best by scalars, the same tuned, if it was, and
    `auto`'s answer, one of the two. keeps: what the answer keeps of each member. key: digest of what it was made
    from."""

    plan: MergePlan
    tuned: MergePlan | None
    answer: MergePlan
    keeps: Mapping[str, float]
    key: str

    def to_json(self) -> dict[str, Any]:
        """`tuned` stands there only where it is not the answer."""
        plans = {"plan": self.plan}
        if self.answer != self.plan:
            plans["answer"] = self.answer
        elif self.tuned is not None:
            plans[TUNED_PLAN] = self.tuned
        rest = {"keeps": dict(self.keeps), "key": self.key}
        return {name: plan.to_json() for name, plan in plans.items()} | rest

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Chosen:
        plans = {name: plan_from_json(row[name]) for name in ("plan", ANSWER, TUNED_PLAN) if name in row}
        answer = plans.get(ANSWER, plans["plan"])
        tuned = plans.get(TUNED_PLAN, answer if ANSWER in plans else None)
        return Chosen(plans["plan"], tuned, answer, row["keeps"], row.get("key", ""))


@dataclass(frozen=True)
class MadeZoo:
    """Of one base: its catalogue, the label store of its merges, and what was chosen."""

    catalogue: Catalogue
    labels: Path
    choices: Mapping[Group, Chosen]

    def to_json(self) -> dict[str, Any]:
        assert self.catalogue.base is not None
        pairs = [{"members": list(members)} | one.to_json() for members, one in self.choices.items()]
        own_task = dict(self.catalogue.own_task)
        num_pairs = len(self.catalogue.pairs())
        return {"base": self.catalogue.base.id, "own_task": own_task, "num_pairs": num_pairs, "pairs": pairs}


@dataclass(frozen=True)
class LabelledGroup:
    """A pair, or a larger set, whose candidates and choice are all labelled.

    items: utilities of the items of the members' tasks, by the names of the candidates, of `CHOSEN`, of `ANSWER`, and
    of `TUNED_PLAN` where that is another one. scores: (retention + exp(-nll)) / 2 on each task's probes, by the names
    of the candidates. by_sureness: the same with retention weighed by the member's own likelihood, see `both_scores`.
    chosen: the plan by scalars. answer: of `auto`, the same or tuned.
    """

    members: Group
    base: str
    items: PairItems
    scores: Mapping[str, Mapping[str, float]]
    by_sureness: Mapping[str, Mapping[str, float]]
    chosen: MergePlan
    answer: MergePlan

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.items[CHOSEN])


@dataclass(frozen=True)
class LabelledZoos:
    """Of one base or several. pairs: or larger sets, those that are whole. num_pairs: across tasks, of all bases.
    own_task: of every expert. base_of: likewise. singles: mean utility of every checkpoint and the bases, by task."""

    pairs: tuple[LabelledGroup, ...]
    num_pairs: int
    own_task: Mapping[str, str]
    base_of: Mapping[str, str]
    singles: Mapping[str, Mapping[str, float]]

    @property
    def bases(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.base_of.values()))


@dataclass(frozen=True)
class PublishedResults:
    """The directory `docs/study/second`: one of `publish_results` for each kind of zoo."""

    root: Path

    def inputs(self) -> dict[str, str]:
        """Digests of labels and choices."""
        found = {}
        for kind in ZOOS:
            found[f"labels of {kind}"] = LabelStore(self.root / kind / "labels").digest()
            found[f"choices of {kind}"] = digest_file(self.root / kind / "choices.json")
        return found


def read_results(directory: Path, named: NamedPlans | None = None) -> LabelledZoos:
    """What `publish_results` wrote. named: the candidates that a pair must have, those of `named_plans` if not said.

    Raises:
        LabelError: labels that must not be compared, or no pair that is whole.
    """
    measured = _measured_items(directory / "labels")
    scores, zoos = both_scores(read_candidates([directory / "labels"])), read_json(directory / "choices.json")["zoos"]
    pairs = tuple(pair for zoo in zoos for pair in _whole_groups(zoo, measured, scores, named or named_plans))
    if not pairs:
        raise LabelError(f"no pair in {directory} has labels of all its fixed candidates and of what was chosen")
    own_task = {name: task for zoo in zoos for name, task in zoo["own_task"].items()}
    base_of = {name: zoo["base"] for zoo in zoos for name in zoo["own_task"]}
    singles = {
        name: {task: float(items.mean()) for task, items in measured.get(MergePlan(source=name), {}).items()}
        for zoo in zoos
        for name in (zoo["base"], *zoo["own_task"])
    }
    return LabelledZoos(pairs, sum(zoo["num_pairs"] for zoo in zoos), own_task, base_of, singles)


def _whole_groups(
    zoo: Mapping[str, Any],
    measured: Mapping[MergePlan, Mapping[str, np.ndarray]],
    scores: Mapping[tuple[frozenset[str], str, MergePlan], tuple[float, float]],
    named: NamedPlans,
) -> Iterable[LabelledGroup]:
    own_task, base = zoo["own_task"], zoo["base"]
    for row in zoo["pairs"]:
        members = tuple(row["members"])
        fixed, all_members = named(members, base), frozenset(members)
        chosen = Chosen.from_json(row)
        made = {CHOSEN: chosen.plan, ANSWER: chosen.answer}
        if chosen.tuned is not None and chosen.tuned != chosen.answer:
            made[TUNED_PLAN] = chosen.tuned
        tasks = [own_task[name] for name in members]
        found = {name: measured.get(one, {}) for name, one in {**fixed, **made}.items()}
        if all(task in items for items in found.values() for task in tasks):
            items = {name: {task: of_task[task] for task in tasks} for name, of_task in found.items()}
            plain, sure = (
                {name: {task: scores[all_members, task, one][kind] for task in tasks} for name, one in fixed.items()}
                for kind in (0, 1)
            )
            yield LabelledGroup(members, base, items, plain, sure, chosen.plan, chosen.answer)


def publish_results(directory: Path, zoos: Sequence[MadeZoo]) -> int:
    """Publish labels, as one file with their notes, and choices; the number of labels."""
    with new_directory(directory) as made:
        write_json(made / "choices.json", {"zoos": [zoo.to_json() for zoo in zoos]})
        store = LabelStore(made / "labels")
        store.append([label for zoo in zoos for label in LabelStore(zoo.labels).read()])
        for zoo in zoos:
            for path in sorted((zoo.labels / NOTES).iterdir()):
                write_atomically(made / "labels" / NOTES / path.name, path.read_bytes())
    return len(LabelStore(directory / "labels").read())


def published_choices(directory: Path, base: str) -> dict[Group, Chosen]:
    """Of one base, those that say what they were made from."""
    zoos = [zoo for zoo in read_json(directory / "choices.json")["zoos"] if zoo["base"] == base]
    return {tuple(row["members"]): Chosen.from_json(row) for zoo in zoos for row in zoo["pairs"] if "key" in row}


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


def named_plans(pair: Group, base: str) -> dict[str, MergePlan]:
    """The fixed candidates, both parents and the base."""
    kept = dict(zip((LEFT, RIGHT, BASE), (*pair, base), strict=True))
    return fixed_candidates(pair) | {name: MergePlan(source=one) for name, one in kept.items()}


def both_scores(rows: CandidateRows) -> dict[tuple[frozenset[str], str, MergePlan], tuple[float, float]]:
    """By members, task and plan: the product's score, and one in which retention weighs c / 2 instead of a half, c the
    likelihood of the member's own answers: whether free text stays the same to the last word says little."""
    retention, likelihood, sure = (
        rows.features[:, COLUMNS.index(name)] for name in ("retention", "likelihood", "own_likelihood")
    )
    both = [weight * retention + (1 - weight) * likelihood for weight in (0.5, sure / 2)]
    keys = zip(map(frozenset, rows.members), rows.tasks, rows.plans, strict=True)
    return dict(zip(keys, zip(*(one.tolist() for one in both), strict=True), strict=True))
