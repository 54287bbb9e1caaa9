"""What becomes of an event that somebody wants to append: the rules of idempotency, without a database.

| asked | answer |
|---|---|
| a key that was used, for the same | REPLAYED with the event of the first time, whatever happened since |
| a key that was used, for anything else | CONFLICT |
| a decision id, arm or epoch that exists | REPLAYED for the same, else CONFLICT |
| a reward, void or close of a decision that is not there | UNKNOWN |
| a reward of a decision that has one | REPLAYED for the same utility, else CONFLICT: it must be voided first |
| a reward of a closed decision; a first reward after its time | GONE |
| a reward that is not a number in [0, 1] | INVALID |
| a void without a reward | REPLAYED for the void of the last one with the same reason, else CONFLICT |
| a close of a decision with a reward | CONFLICT |

A reward without a key that repeats a voided one is a new reward: only a key tells a late retry from a correction.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.service.log import events
from simmerge_ray.service.log.events import Event, EventRow
from simmerge_ray.service.log.fold import Decisions
from simmerge_ray.service.schemas import check_utility

MAX_NAME = 200  # characters of a key, id or name: the width of its column


class Status(IntEnum):
    """Of an append; the values are those of HTTP."""

    CREATED = 201
    REPLAYED = 200
    UNKNOWN = 404
    CONFLICT = 409
    GONE = 410
    INVALID = 422


@dataclass(frozen=True)
class Outcome:
    """row: the event in the log, of this append (CREATED) or the first one like it (REPLAYED). reason: of a refusal."""

    status: Status
    row: EventRow | None = None
    reason: str = ""


@dataclass(frozen=True)
class Proposal:
    """An event to append. at: seconds since 1970, by the clock of who asks. digest: of what was asked."""

    event: Event
    encoded: tuple[str, bytes]
    at: float
    key: str | None
    digest: str

    def row(self, event: Event, attempt: int, seq: int) -> EventRow:
        """The row of the event that `Known.judge` let pass."""
        body, data = self.encoded if event is self.event else events.encode(event)
        about = event.kind, events.VERSION, event.subject, attempt
        return EventRow(seq, self.at, *about, self.key, self.digest, body, data)


def proposal_of(event: Event, at: float, key: str | None = None, payload: object = None) -> Proposal:
    """payload: see `events.request_digest`.
    Raises ConfigError: a key, id or name that is empty or longer than a column. ValueError: JSON with NaN.
    """
    for what, name in (("idempotency key", key), (event.kind, event.subject)):
        if name is not None and not (0 < len(name) <= MAX_NAME and name.isprintable()):
            raise ConfigError(f"the {what} {name[:40]!r} must have 1 to {MAX_NAME} characters that can be printed")
    encoded = events.encode(event)
    return Proposal(event, encoded, at, key, events.request_digest(event, encoded, payload))


def invalid(event: Event) -> Outcome | None:
    """The refusal of an event that no log could take."""
    if isinstance(event, events.RewardGiven):
        try:
            check_utility(event.utility)
        except ValueError as error:
            return Outcome(Status.INVALID, reason=str(error))
    return None


class Known:
    """What the log holds about the proposals of a batch; events of the batch itself are added as they are accepted."""

    def __init__(self, rows: Iterable[EventRow] = ()) -> None:
        self._keys: dict[str, EventRow] = {}
        self._latest: dict[tuple[str, str], EventRow] = {}  # by kind and subject
        self._decisions = Decisions(lambda row: row)
        for row in sorted(rows):
            self.add(row)

    def add(self, row: EventRow) -> None:
        """One more event, later than the others."""
        if row.idempotency_key is not None:
            self._keys[row.idempotency_key] = row
        if row.subject is not None:
            self._latest[row.kind, row.subject] = row
        self._decisions.apply(row)

    def judge(self, proposal: Proposal) -> Outcome | tuple[Event, int]:
        """What to answer, or the event to append and its attempt."""
        if proposal.key is not None and (first := self._keys.get(proposal.key)) is not None:
            return _replayed(proposal, first, f"the idempotency key {proposal.key!r} was used for another request")
        event, subject = proposal.event, proposal.event.subject
        if subject is None:
            return event, 0
        if isinstance(event, events.RewardGiven | events.RewardVoided | events.DecisionClosed):
            return self._judge_of_decision(proposal, event, subject)
        if (existing := self._latest.get((event.kind, subject))) is not None:
            return _replayed(proposal, existing, f"{event.kind.replace('_', ' ')} {subject!r} exists and is different")
        return event, 0

    def _judge_of_decision(
        self, proposal: Proposal, event: events.RewardGiven | events.RewardVoided | events.DecisionClosed, subject: str
    ) -> Outcome | tuple[Event, int]:
        course = self._decisions.courses.get(subject)
        if course is None:
            return Outcome(Status.UNKNOWN, reason=f"no decision {subject!r}")

        def again(kind: str, otherwise: str) -> Outcome:
            return _replayed(proposal, self._latest[kind, subject], otherwise)

        if isinstance(event, events.RewardVoided):
            if course.reward is not None:
                return replace(event, reward_seq=course.reward[0]), course.num_voids
            if course.num_voids:
                return again(event.kind, f"the reward of {subject!r} is void already, for another reason")
            return Outcome(Status.CONFLICT, reason=f"decision {subject!r} has no reward to void")
        if isinstance(event, events.DecisionClosed):
            if course.closed is not None:
                return again(event.kind, f"decision {subject!r} was closed for another reason")
            if course.reward is not None:
                return Outcome(Status.CONFLICT, reason=f"decision {subject!r} has a reward; void it before closing")
            return event, 0
        if course.reward is not None:
            return again(event.kind, f"decision {subject!r} has another reward; void it first")
        if course.closed is not None:
            return Outcome(Status.GONE, reason=f"decision {subject!r} is closed")
        if course.is_late(_expires_at(course.decision), proposal.at):
            return Outcome(Status.GONE, reason=f"decision {subject!r} has expired")
        return event, course.num_voids


def _replayed(proposal: Proposal, first: EventRow, otherwise: str) -> Outcome:
    same = first.kind == proposal.event.kind and first.digest == proposal.digest
    return Outcome(Status.REPLAYED, first) if same else Outcome(Status.CONFLICT, reason=otherwise)


def _expires_at(decision: EventRow) -> float | None:
    try:
        found: float | None = json.loads(decision.body)["expires_at"]
        return None if found is None else found + 0.0
    except events.DAMAGES as error:
        raise events.unreadable(decision, error) from error
