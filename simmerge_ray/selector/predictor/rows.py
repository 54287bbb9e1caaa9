"""Labels joined with candidate signals: one row for each candidate and task of a set of members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simmerge_ray.base.errors import LabelError
from simmerge_ray.base.storage import Place
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.search.evaluation.answers import PREFIX, kept_and_nll
from simmerge_ray.search.labels import LabelStore, Measured, check_comparable
from simmerge_ray.selector.data.splits import Fold
from simmerge_ray.selector.predictor.answers import AnswersNote, read_notes
from simmerge_ray.selector.predictor.signals import COLUMNS, SingleValues, candidate_features

Kept = Mapping[AnswersNote, tuple[float, float]]


@dataclass(frozen=True)
class CandidateRows:
    """N rows (candidate, task), each of the candidates of one set of members: merges of all of these, each of them as
    it is, and the base.

    features: (N, F), of `signals.COLUMNS`. utility: (N,). members, bases (id and digest), tasks, plans: of each row.
    """

    features: np.ndarray
    utility: np.ndarray
    members: tuple[tuple[str, ...], ...]
    bases: tuple[str, ...]
    tasks: tuple[str, ...]
    plans: tuple[MergePlan, ...]

    def subset(self, rows: Sequence[int]) -> CandidateRows:
        """Some of the rows."""
        return CandidateRows(
            self.features[list(rows)],
            self.utility[list(rows)],
            tuple(self.members[row] for row in rows),
            tuple(self.bases[row] for row in rows),
            tuple(self.tasks[row] for row in rows),
            tuple(self.plans[row] for row in rows),
        )

    @property
    def order(self) -> list[int]:
        """Rows by base, members, task and plan: the order in which labels came plays no part."""
        keys = [
            (base, members, task, plan.id)
            for base, members, task, plan in zip(self.bases, self.members, self.tasks, self.plans, strict=True)
        ]
        return sorted(range(len(keys)), key=keys.__getitem__)

    def choices(self) -> dict[tuple[str, tuple[str, ...]], dict[str, list[int]]]:
        """Rows of each plan by (base, members): what is chosen among, and the tasks that count together."""
        found: dict[tuple[str, tuple[str, ...]], dict[str, list[int]]] = {}
        for row, (base, members, plan) in enumerate(zip(self.bases, self.members, self.plans, strict=True)):
            found.setdefault((base, members), {}).setdefault(plan.id, []).append(row)
        return found

    def base_folds(self) -> list[Fold]:
        """Each base left out in turn."""
        every = range(len(self.bases))
        return [
            Fold(
                base,
                tuple(row for row in every if self.bases[row] != base),
                tuple(row for row in every if self.bases[row] == base),
            )
            for base in sorted(set(self.bases))
        ]


def join_rows(parts: Sequence[CandidateRows]) -> CandidateRows:
    """Rows of several bases."""
    columns = (sum((getattr(one, name) for one in parts), ()) for name in ("members", "bases", "tasks", "plans"))
    return CandidateRows(
        np.concatenate([one.features for one in parts]), np.concatenate([one.utility for one in parts]), *columns
    )


def read_candidates(stores: Sequence[Place]) -> CandidateRows:
    """Rows of some label stores, one or several bases.

    Raises:
        LabelError: a store without candidate signals, or with labels that must not be compared.
    """
    return join_rows([_of_store(store) for store in stores])


def _of_store(store: Place) -> CandidateRows:
    labels, notes = LabelStore(store).read(), read_notes(store)
    by_digest: dict[str, list[AnswersNote]] = {}  # of members that answer alike: their answers are one task
    for note in notes:
        by_digest.setdefault(note.digest, []).append(note)
    measured = [(label, label.outcome) for label in labels if isinstance(label.outcome, Measured)]
    utility: dict[MergePlan, dict[str, float]] = {}
    kept: dict[MergePlan, dict[AnswersNote, tuple[float, float]]] = {}
    for label, outcome in measured:
        if not label.task.startswith(PREFIX):
            utility.setdefault(label.plan, {})[label.task] = outcome.utility
            continue
        for note in by_digest.get(label.task_digest, ()):
            of_answers, nll = kept_and_nll(outcome.items, note.num_tokens)
            found = float(of_answers.mean()), float(nll.sum() / note.num_tokens.sum())
            kept.setdefault(label.plan, {})[note] = found
    check_comparable([label for label, _ in measured if not label.task.startswith(PREFIX)])
    digests = {name: digest for label, _ in measured for name, digest in label.checkpoints.items()}
    sets = sorted({tuple(sorted(plan.members)) for plan in kept if plan.is_merge and len(plan.members) > 1})
    found_rows = (_of_members(members, notes, utility, kept, digests) for members in sets)
    parts = [one for one in found_rows if one is not None]
    if not parts:
        raise LabelError(
            f"no candidate signals in {store}: no merge has labels of its tasks and of its members' answers; "
            "`simmerge labels make --probes` writes both"
        )
    return join_rows(parts)


def _of_members(
    members: tuple[str, ...],
    notes: Sequence[AnswersNote],
    utility: Mapping[MergePlan, Mapping[str, float]],
    kept: Mapping[MergePlan, Kept],
    digests: Mapping[str, str],
) -> CandidateRows | None:
    """None where something of the members or the base is missing."""
    owners = sorted((note for note in notes if note.owner in members), key=lambda note: (note.owner, note.task))
    base = next(iter({note.base for note in owners}), "")
    of_base = kept.get(MergePlan(source=base), {}) if base else {}
    own = [kept.get(MergePlan(source=note.owner), {}).get(note) for note in owners]
    if {note.owner for note in owners} != set(members) or not all(note in of_base for note in owners) or None in own:
        return None
    singles = SingleValues(
        np.array([of_base[note][0] for note in owners]),
        np.array([of_base[note][1] for note in owners]),
        np.array([one[1] for one in own if one is not None]),
    )
    sources = {MergePlan(source=name) for name in (base, *members)}
    plans = [
        plan
        for plan in kept
        if (plan in sources or (plan.is_merge and tuple(sorted(plan.members)) == members))
        and all(note in kept[plan] for note in owners)
    ]
    values = np.array([[kept[plan][note] for note in owners] for plan in plans])
    tasks, features = candidate_features([note.task for note in owners], values[..., 0], values[..., 1], singles)
    rows = [
        (features[n, t], utility[plan][task], members, f"{base}@{digests[base][:8]}", task, plan)
        for n, plan in enumerate(plans)
        for t, task in enumerate(tasks)
        if task in utility.get(plan, {})
    ]
    if not rows:
        return None
    inputs, targets, *columns = zip(*rows, strict=True)
    return CandidateRows(np.array(inputs).reshape(-1, len(COLUMNS)), np.array(targets), *columns)
