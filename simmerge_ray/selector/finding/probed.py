"""Candidates merged in memory and run over probes and answers: nothing is generated, no label is needed.

A probed candidate is a trial of a search on tasks without labels (`search.evaluation.answers`), so it runs where trials
run, on vLLM too, and what a label store holds is never run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from simmerge_ray.base.config import SearchConfig
from simmerge_ray.base.finding import first_part, first_round
from simmerge_ray.checkpoints.catalogue import Catalogue
from simmerge_ray.plans.plan import MergePlan
from simmerge_ray.search.evaluation.answers import AnswersTask
from simmerge_ray.search.labels import LabelStore, Measured
from simmerge_ray.search.setup import PreparedSearch, grid_trials, prepare_search
from simmerge_ray.selector.finding.aim import Aim
from simmerge_ray.signals.candidates.answers import Answers
from simmerge_ray.signals.candidates.signatures import OwnAnswers

Chosen = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class ProbedPlan:
    """What a merge keeps: retention (owners,) in [0, 1] and nll (owners,) in nats a token, over `num_probes` of each
    member; score is the aim's, kept its objective of retention alone."""

    plan: MergePlan
    retention: np.ndarray
    nll: np.ndarray
    num_probes: int
    score: float
    kept: float


class RunTrials(Protocol):
    """Measures what is missing: `on_ray.merge_search.run_search`, or `in_this_process`."""

    def __call__(
        self, catalogue: Catalogue, tasks: Mapping[str, AnswersTask], plans: Sequence[MergePlan]
    ) -> PreparedSearch: ...


class Prober:
    """Runs candidates over the first probes of every owner, and keeps what it finds in a label store.

    Args:
        run: measures plans on tasks into the label store of the search that it returns. known: retention and nll,
            (owners,) each, of plans that have been run over all answers already and are not run again for that.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        answers: Sequence[OwnAnswers],
        aim: Aim,
        run: RunTrials,
        known: Mapping[MergePlan, tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> None:
        self.known = known or {}
        own_answers = {one.owner: one for one in answers}
        self._pairs = [token_pairs(own_answers[owner].answers) for owner in aim.owners]
        self._aim, self._run = aim, run
        # Every candidate is asked for all answers, whoever its members are.
        self._catalogue = replace(catalogue, own_task=dict.fromkeys(catalogue.ids))

    @property
    def num_probes(self) -> int:
        """The most that an owner has."""
        return max(map(len, self._pairs))

    @property
    def parts(self) -> list[int]:
        """Ends of the parts that the probes are run in: of the first round, if it is worth one, and of all."""
        first = first_part(self.num_probes)
        return [first, self.num_probes] if first else [self.num_probes]

    def probe(
        self, plans: Sequence[MergePlan], bounds: Sequence[int], chosen: Chosen | None = None
    ) -> list[ProbedPlan]:
        """What the plans keep of the first `bounds[-1]` probes; the plans that cannot be measured are left out.

        Args:
            bounds: ends of the parts that the probes are run in, so that a later round runs only what is new.
            chosen: counts a part of the probes only; from their number to which of them, (n,) bool.
        """
        is_whole = chosen is None and bounds[-1] >= self.num_probes
        counted = bounds[-1] if chosen is None else int(chosen(bounds[-1]).sum())
        there = {plan: self.known[plan] for plan in plans if plan in self.known} if is_whole else {}
        measured = dict(self._measured([plan for plan in plans if plan not in there], bounds, chosen)) | there
        return [self._scored(plan, *measured[plan], counted) for plan in plans if plan in measured]

    def _scored(self, plan: MergePlan, retention: np.ndarray, nll: np.ndarray, num_probes: int) -> ProbedPlan:
        score = float(self._aim.scores(retention[None], nll[None])[0])
        return ProbedPlan(plan, retention, nll, num_probes, score, float(self._aim.pooled(retention[None])[0]))

    def _measured(
        self, plans: Sequence[MergePlan], bounds: Sequence[int], chosen: Chosen | None
    ) -> Iterator[tuple[MergePlan, tuple[np.ndarray, np.ndarray]]]:
        """Retention and nll of the plans that can be run."""
        if not plans:
            return
        found, tasks = self._tasks(bounds)
        search = self._run(self._catalogue, tasks, plans)
        known = {label.key: label.outcome for label in LabelStore(search.labels_uri).read()}
        for plan in plans:
            outcomes = {name: known.get(search.key(plan, name)) for name in tasks}
            items = {name: one.items for name, one in outcomes.items() if isinstance(one, Measured)}
            if len(items) == len(tasks):
                values = [_joined([(tasks[name], items[name]) for name in names], chosen) for names in found]
                retention, nll = (np.array(column) for column in zip(*values, strict=True))
                yield plan, (retention, nll)

    def _tasks(self, bounds: Sequence[int]) -> tuple[list[list[str]], dict[str, AnswersTask]]:
        """Names of the tasks of every owner, and the tasks."""
        names: list[list[str]] = []
        tasks: dict[str, AnswersTask] = {}
        for owner, pairs in zip(self._aim.owners, self._pairs, strict=True):
            names.append([])
            for start, stop in zip((0, *bounds), bounds, strict=False):
                if part := pairs[start:stop]:
                    task = AnswersTask(f"{owner.checkpoint} to {owner.task} {start}-{stop}", part)
                    tasks[task.name] = task
                    names[-1].append(task.name)
        return names, tasks


def _joined(parts: Sequence[tuple[AnswersTask, np.ndarray]], chosen: Chosen | None) -> tuple[float, float]:
    """Retention and nats a token."""
    rows = [(*task.kept_and_nll(items), task.num_tokens) for task, items in parts]
    kept, nll, num_tokens = (np.concatenate(column) for column in zip(*rows, strict=True))
    counted = np.ones(len(kept), dtype=bool) if chosen is None else chosen(len(kept))
    return float(kept[counted].mean()), float(nll[counted].sum() / num_tokens[counted].sum())


def halve(
    prober: Prober, plans: Sequence[MergePlan], always: Sequence[MergePlan], report: Callable[[str], None] | None = None
) -> list[ProbedPlan]:
    """Successive halving over probes: all plans on a part of the probes, the best on all of them; best first.

    Args:
        always: what is run over all probes in any case (the checkpoints as they are, the plain average).
    """
    kept, bounds = list(plans), prober.parts
    first, survivors = first_round(bounds[-1], len(kept))
    if first:
        if report:
            report(f"{len(kept)} candidates on {first} probes of each member")
        ranked = sorted(prober.probe(kept, bounds[:1]), key=lambda one: -one.score)
        kept = [one.plan for one in ranked[:survivors]]
    kept = list({plan.id: plan for plan in (*always, *kept)}.values())
    if report:
        known = sum(plan in prober.known for plan in kept)
        also = f"; what {known} checkpoints and averages keep is in the signatures" if known else ""
        report(f"{len(kept) - known} candidates and checkpoints on all {bounds[-1]} probes{also}")
    # Equally good ones stand in the order in which they came: checkpoints before merges.
    return sorted(prober.probe(kept, bounds), key=lambda one: -one.score)


def in_this_process(config: SearchConfig, labels_uri: str, start: Callable[[PreparedSearch], object]) -> RunTrials:
    """Trials one after the other here, with one evaluator that is kept.

    Args:
        start: starts the evaluator, as `search.runner.TrialRunner` takes it.
    """
    from simmerge_ray.search.runner import TrialRunner

    started: list[object] = []

    def kept_evaluator(search: PreparedSearch) -> object:
        if not started:
            started.append(start(search))
        return started[0]

    def run(catalogue: Catalogue, tasks: Mapping[str, AnswersTask], plans: Sequence[MergePlan]) -> PreparedSearch:
        search = prepare_search(catalogue, tasks, config, labels_uri, plans_given=True)
        runner = TrialRunner(search, kept_evaluator)  # type: ignore[arg-type]
        for trial in grid_trials(search, plans):
            runner.run(trial)
        return search

    return run


def token_pairs(answers: Answers) -> list[tuple[list[int], list[int]]]:
    """Tokens of each probe and of its answer."""
    pairs = []
    for batch in answers.batches:
        for row in range(len(batch.input_ids)):
            answer = batch.tokens[batch.rows == row].tolist()
            whole = batch.input_ids[row, : int(batch.attention_mask[row].sum())].tolist()
            pairs.append((whole[: len(whole) - len(answer)], answer))
    return pairs
