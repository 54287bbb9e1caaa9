"""Answers of the API about what the service knows: outcomes of events, the policy, the catalogue, signals."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from simmerge_ray.service import schemas
from simmerge_ray.service.bandit.posterior import GaussianPosterior
from simmerge_ray.service.log.events import EventRow
from simmerge_ray.service.log.outcomes import Outcome, Status
from simmerge_ray.service.registry import Published
from simmerge_ray.service.schemas import Refused
from simmerge_ray.signals.table import SignalTable


def accepted(outcome: Outcome) -> EventRow:
    """The event that is in the log. Raises Refused where it is not."""
    if outcome.status not in (Status.CREATED, Status.REPLAYED) or outcome.row is None:
        raise Refused(int(outcome.status), outcome.reason)
    return outcome.row


def _said(outcome: Outcome) -> Literal["created", "replayed"]:
    return "created" if outcome.status == Status.CREATED else "replayed"


def reward_answer(decision_id: str, outcome: Outcome, **told: Any) -> tuple[int, schemas.RewardAnswer]:
    """Status and answer for an event about a decision. Raises Refused."""
    row = accepted(outcome)
    answer = schemas.RewardAnswer(decision_id=decision_id, seq=row.seq, at=row.at, status=_said(outcome), **told)
    return int(outcome.status), answer


def event_summary(outcome: Outcome) -> tuple[int, schemas.EventSummary]:
    """Status and answer for any other event. Raises Refused."""
    row = accepted(outcome)
    return int(outcome.status), schemas.EventSummary(seq=row.seq, at=row.at, kind=row.kind, status=_said(outcome))


def safe_policy(published: Published) -> schemas.SafePolicy:
    """The rule by which a selector leaves its best fixed arm."""
    override = published.selector.override
    return schemas.SafePolicy(fixed=override.best_fixed, threshold=None if override.never else override.threshold)


def catalogue_answer(table: SignalTable, published: Published, arms: list[str]) -> schemas.CatalogueAnswer:
    """What may be asked for."""
    own, known = table.provenance["own_task"], set(table.checkpoint_ids)
    pairs = [pair for pair in published.selector.provenance.get("pairs", ()) if set(pair) <= known]
    return schemas.CatalogueAnswer(
        checkpoints=[schemas.CatalogueCheckpoint(id=name, task=own.get(name)) for name in table.checkpoint_ids],
        tasks=list(table.tasks),
        arms=arms,
        signals=list(table.columns),
        example=schemas.ExamplePair(left=pairs[0][0], right=pairs[0][1]) if pairs else None,
    )


def signal_matrix(
    table: SignalTable, signal: str, task: str | None, part: str = "", offset: int = 0, limit: int = 200
) -> schemas.SignalMatrix:
    """A signal of all pairs of some checkpoints: of those with `part` in their ids, whatever the case, `limit` from
    `offset` on. Raises Refused (404)."""
    task = task or table.tasks[0]
    if signal not in table.columns:
        raise Refused(404, f"unknown signal {signal[:80]!r}")
    if task not in table.tasks:
        raise Refused(404, f"unknown task {task[:80]!r}")
    ids = table.checkpoint_ids
    matching = [place for place, name in enumerate(ids) if part.lower() in name.lower()]
    shown = matching[offset : offset + limit]
    at = np.array(shown, dtype=np.int64) - len(ids)  # the base, if any, stands before them
    values = table.matrix(signal, task)[np.ix_(at, at)].astype(object)
    values[np.eye(len(shown), dtype=bool)] = None
    return schemas.SignalMatrix(
        signal=signal,
        task=task,
        checkpoints=[ids[place] for place in shown],
        values=values.tolist(),
        num_matching=len(matching),
    )


def arm_state(arm: str, one: GaussianPosterior, context: np.ndarray | None, noise_sd: float) -> schemas.ArmState:
    """What is known of an arm, at the mean context of the decisions."""
    mean, sd = (None, None) if context is None else one.marginal(context)
    return schemas.ArmState(
        arm=arm,
        count=one.count,
        weight=one.weight,
        mean=mean,
        sd=None if sd is None else noise_sd * sd,
        entropy=entropy(one, noise_sd),
    )


def entropy(one: GaussianPosterior, noise_sd: float) -> float:
    """Of the Gaussian over the weights, in nats: `(d (1 + log 2 pi v^2) - log |A|) / 2`."""
    _, log_determinant = np.linalg.slogdet(one.precision)
    dimensions = one.num_dimensions
    return float(0.5 * (dimensions * (1 + math.log(2 * math.pi * noise_sd**2)) - log_determinant))
