"""Answers in signatures: every owner's answers to its probes, and every checkpoint's log-probabilities there.

An *owner* is a member with the probes of its own task, or the base with the general probes ("does not forget" is one
more member). Three rounds of units, each kept in the signature store as soon as it is whole: owners write; the base
says which tokens are likely for it; every checkpoint is run over every owner's probes and answers once. A new
checkpoint in the catalogue costs its own answers and one pass over those of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.base.storage import digest_bytes, digest_json
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.checkpoints.probes import GENERAL, ProbeSet
from simmerge_ray.plans.plan import ResolvedPlan
from simmerge_ray.signals.candidates.answers import (
    Answers,
    AnswerSpec,
    Likeliest,
    check_answered,
    chosen_tokens,
    join_answers,
)
from simmerge_ray.signals.candidates.retention import check_members
from simmerge_ray.signals.candidates.virtual import KeptAnswers, LogProbs
from simmerge_ray.signals.queue import Executor, Unit, WorkQueue, checked_results
from simmerge_ray.signals.signature import SignatureSpec, SignatureStore
from simmerge_ray.signals.tokens import tokenize_probes

_SCHEMA = 1


@dataclass(frozen=True)
class Owner:
    """Whose answers to which task's probes."""

    checkpoint: str
    task: str


@dataclass(frozen=True)
class OwnAnswers:
    """One owner's answers with what all checkpoints of the catalogue think of them.

    tokens: (S, K) int64, whose log-probabilities are kept. key: digest of all that they were computed from.
    """

    owner: Owner
    answers: Answers
    kept: KeptAnswers
    tokens: np.ndarray
    key: str


MAX_MEMBERS = 100  # whose answers all others are run over: work and disk grow with their square


def owners_of(catalogue: Catalogue, tasks: Sequence[str]) -> list[Owner]:
    """Members whose own task has probes, in the catalogue's order, then the base if there are general probes."""
    found = [Owner(name, task) for name in catalogue.ids if (task := catalogue.own_task.get(name)) in tasks and task]
    if catalogue.base is not None and GENERAL in tasks:
        found.append(Owner(catalogue.base.id, GENERAL))
    return found


def collect_answers(
    catalogue: Catalogue,
    probe_sets: Mapping[str, ProbeSet],
    store: SignatureStore,
    executor: Executor,
    spec: AnswerSpec | None = None,
    signature: SignatureSpec | None = None,
    digests: Mapping[str, str] | None = None,
) -> list[OwnAnswers]:
    """Answers of all owners, computed where they are not in the store, by `executor` (`compute.local_executor`): the
    same bits whoever runs the units.

    Args:
        digests: of the checkpoints by id, where they are known; None takes them from the files.

    Raises:
        ProbeError: a probe that cannot be used; an owner all of whose answers are empty. CheckpointError: checkpoints
            that cannot be used, each named.
    """
    return _Collector(catalogue, probe_sets, store, executor, spec, signature, digests).collect()


def members_answers(
    catalogue: Catalogue,
    probe_sets: Mapping[str, ProbeSet],
    store: SignatureStore,
    executor: Executor,
    spec: AnswerSpec | None = None,
) -> dict[Owner, Answers]:
    """`collect_answers` without what the other checkpoints think of the answers: a pass a checkpoint instead of M."""
    collector = _Collector(catalogue, probe_sets, store, executor, spec)
    return collector.written(collector.owners)


class _Collector:
    """Arguments as of `collect_answers`."""

    def __init__(
        self,
        catalogue: Catalogue,
        probe_sets: Mapping[str, ProbeSet],
        store: SignatureStore,
        run: Executor,
        spec: AnswerSpec | None,
        signature: SignatureSpec | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        self._catalogue, self._store, self._run, self._spec = catalogue, store, run, spec or AnswerSpec()
        self._digests = digests or catalogue.digests()
        self.owners = owners_of(catalogue, tuple(probe_sets))
        used = {owner.task: probe_sets[owner.task] for owner in self.owners}
        self._batches = tokenize_probes(catalogue, used, signature or SignatureSpec(), self._spec.max_tokens)

    def collect(self) -> list[OwnAnswers]:
        owners, keys = self.owners, {owner: self._key(owner) for owner in self.owners}
        self._write([owner for owner in owners if not self._store.has("answers", keys[owner])], keys)
        written = {owner: self._store.read("answers", keys[owner]) for owner in owners}
        answers = {owner: self._joined(owner, written[owner]["written"]) for owner in owners}
        refs = [ref.id for ref in self._catalogue.all_refs]
        wanted = [(name, owner) for name in refs for owner in owners]
        missing = [pair for pair in wanted if not self._store.has("kept", self._kept_key(*pair, keys))]
        units = [(name, owner, Unit("kept", name, (batch, tokens))) for name, owner in missing
                 for batch, tokens in _split(answers[owner], written[owner]["kept"])]  # fmt: skip
        for (name, owner), parts in _grouped(self._run, units):
            about = {"checkpoint": name, "owner": owner.checkpoint, "task": owner.task}
            self._store.write("kept", self._kept_key(name, owner, keys), _kept_arrays(parts), about)
        return [
            OwnAnswers(owner, one, self._kept(owner, one, keys), written[owner]["kept"], keys[owner])
            for owner, one in answers.items()
        ]

    def written(self, owners: Sequence[Owner]) -> dict[Owner, Answers]:
        """Answers of the owners, written where they are not in the store."""
        keys = {owner: self._key(owner) for owner in owners}
        units = [
            (owner.checkpoint, owner, Unit("answers", owner.checkpoint, (batch, self._spec)))
            for owner in owners
            if not self._store.has("written", keys[owner])
            for batch in self._batches[owner.task]
        ]
        for (_, owner), parts in _grouped(self._run, units):
            tokens = np.concatenate([one for one, _ in parts])
            arrays = _flat([likely for _, likely in parts]) | {"written": tokens}
            self._store.write("written", keys[owner], arrays, _of(owner))
        found = {owner: self._store.read("written", keys[owner])["written"] for owner in owners}
        return {owner: self._joined(owner, one) for owner, one in found.items()}

    def _write(self, owners: Sequence[Owner], keys: Mapping[Owner, str]) -> None:
        """Answers of the owners that have none yet, and the tokens that are kept there."""
        answers = self.written(owners)
        found = {owner: self._store.read("written", keys[owner]) for owner in owners}
        base = self._catalogue.base
        looked = [
            (base.id, owner, Unit("likeliest", base.id, (batch, self._spec.num_kept)))
            for owner, one in answers.items()
            if base is not None and owner.checkpoint != base.id
            for batch in one.batches
        ]
        for owner, one in answers.items():
            if base is None or owner.checkpoint == base.id:
                self._keep(owner, one, found[owner], [], keys)
        for (_, owner), parts in _grouped(self._run, looked):
            self._keep(owner, answers[owner], found[owner], parts, keys)

    def _keep(
        self,
        owner: Owner,
        answers: Answers,
        own: Mapping[str, np.ndarray],
        of_base: Sequence[Likeliest],
        keys: Mapping[Owner, str],
    ) -> None:
        lists = [(own["tokens"], own["likely"])]
        if of_base:
            both = _flat(of_base)
            lists.append((both["tokens"], both["likely"]))
        kept = chosen_tokens(answers.tokens, lists, self._spec.num_kept)
        self._store.write("answers", keys[owner], {"written": own["written"], "kept": kept}, _of(owner))

    def _joined(self, owner: Owner, written: np.ndarray) -> Answers:
        """Raises ProbeError: see `check_answered`."""
        rows = [row[row >= 0].tolist() for row in written]
        check_answered(owner.checkpoint, owner.task, rows, self._spec.max_tokens)
        batches, parts, start = self._batches[owner.task], [], 0
        for batch in batches:
            parts.append(rows[start : start + len(batch.input_ids)])
            start += len(batch.input_ids)
        return join_answers(batches, parts, owner.task)

    def _kept(self, owner: Owner, answers: Answers, keys: Mapping[Owner, str]) -> KeptAnswers:
        found = [self._store.read("kept", self._kept_key(ref.id, owner, keys)) for ref in self._catalogue.all_refs]
        base = found.pop(0) if self._catalogue.base is not None else None
        return KeptAnswers(
            self._catalogue.ids,
            np.stack([one["likely"] for one in found]),
            np.stack([one["rest"] for one in found]),
            None if base is None else base["likely"],
            None if base is None else base["rest"],
            owner.checkpoint,
            answers.answer,
        )

    def _key(self, owner: Owner) -> str:
        """Digest of all that an owner's answers and kept tokens were computed from."""
        ids = [
            digest_bytes(f"{tuple(batch.input_ids.shape)}".encode(), batch.input_ids.numpy().tobytes(),
                         batch.attention_mask.numpy().tobytes())
            for batch in self._batches[owner.task]
        ]  # fmt: skip
        base = self._digests[self._catalogue.base.id] if self._catalogue.base else None
        return digest_json(["answers", _SCHEMA, self._digests[owner.checkpoint], base, ids, vars(self._spec)])

    def _kept_key(self, checkpoint_id: str, owner: Owner, keys: Mapping[Owner, str]) -> str:
        return digest_json(["kept", _SCHEMA, self._digests[checkpoint_id], keys[owner]])


def answers_of_merge(
    merge: ResolvedPlan,
    answers: Sequence[OwnAnswers],
    store: SignatureStore,
    executor: Executor,
    digests: Mapping[str, str],
) -> dict[Owner, LogProbs]:
    """A merge's log-probabilities at every owner's answers, computed where they are not in the store.

    Args:
        digests: of the merge's checkpoints by id.

    Raises:
        CheckpointError: the merge, or what it answers, is not finite.
    """
    name = merge.plan.label
    made_of = [merge.plan.id, *(digests[ref.id] for ref in merge.used_refs)]
    keys = {one.owner: digest_json(["kept of merge", _SCHEMA, made_of, one.key]) for one in answers}
    units = [(name, one.owner, Unit("kept of merge", merge.checkpoints[0].id, (batch, tokens, merge)))
             for one in answers if not store.has("kept", keys[one.owner])
             for batch, tokens in _split(one.answers, one.tokens)]  # fmt: skip
    for (_, owner), parts in _grouped(executor, units):
        about = {"merge": name, "owner": owner.checkpoint, "task": owner.task}
        store.write("kept", keys[owner], _kept_arrays(parts), about)
    found = {owner: store.read("kept", key) for owner, key in keys.items()}
    return {owner: (one["likely"], one["rest"]) for owner, one in found.items()}


def _grouped(run: Executor, units: Sequence[tuple[str, Owner, Unit]]) -> Iterator[tuple[tuple[str, Owner], list[Any]]]:
    """Results by checkpoint and owner, in the order of the units, each as soon as it is whole."""
    owners = [(name, owner) for name, owner, _ in units]
    places: dict[tuple[str, Owner], list[int]] = {}
    for number, group in enumerate(owners):
        places.setdefault(group, []).append(number)
    results: dict[int, Any] = {}
    left = {group: len(numbers) for group, numbers in places.items()}
    for number, result in checked_results(run, WorkQueue(unit for _, _, unit in units)):
        results[number] = result
        left[owners[number]] -= 1
        if not left[owners[number]]:
            yield owners[number], [results.pop(place) for place in places[owners[number]]]


def _kept_arrays(parts: Sequence[LogProbs]) -> dict[str, np.ndarray]:
    """`units.kept` of all micro-batches in a row."""
    likely, rest = (np.concatenate(part) for part in zip(*parts, strict=True))
    return {"likely": likely, "rest": rest}


def _flat(parts: Sequence[Likeliest]) -> dict[str, np.ndarray]:
    """`units.likeliest` of all micro-batches in a row."""
    tokens, likely = (np.concatenate(part) for part in zip(*parts, strict=True))
    return {"tokens": tokens, "likely": likely}


def _of(owner: Owner) -> dict[str, str]:
    return {"checkpoint": owner.checkpoint, "task": owner.task}


def _split(answers: Answers, kept: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """Micro-batches with the kept tokens of their positions."""
    start = 0
    for batch in answers.batches:
        yield batch, kept[start : start + len(batch.tokens)]
        start += len(batch.tokens)


def check_owners(catalogue: Catalogue, probe_sets: Mapping[str, ProbeSet]) -> None:
    """Refuse a catalogue without a base: candidates are mixed from what members add to it; and one of too many members:
    each is run over the answers of all, and all of it is mixed in memory.

    Raises:
        ConfigError, ProbeError: with the remedy.
    """
    if (num := len(catalogue.checkpoints)) > MAX_MEMBERS:
        raise ConfigError(
            f"{num} members are too many to choose among without labels, {MAX_MEMBERS} at most: every one is run over "
            "the answers of all others; name the promising ones with --member, such as those of `simmerge plan`"
        )
    if catalogue.base is None:
        raise ConfigError(
            "what a merge keeps is told from what its members added to a common base: name it under `base` in the "
            "catalogue"
        )
    check_members(catalogue, probe_sets)
