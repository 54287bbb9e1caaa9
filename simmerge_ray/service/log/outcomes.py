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
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

from simmerge_ray.base.errors import ConfigError
from simmerge_ray.service.log.events import (
    VERSION,
    DecisionClosed,
    Event,
    RewardGiven,
    RewardVoided,
    digest_of,
    encode,
    subject_of,
)
from simmerge_ray.service.log.fold import EventRow

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
class Entry:
    """An event to append. at: seconds since 1970, by the clock of who asks. digest: of what was asked."""

    event: Event
    encoded: tuple[str, bytes]
    at: float
    key: str | None
    digest: str

    @property
    def subject(self) -> str | None:
        return subject_of(self.event)


def entry_of(event: Event, at: float, key: str | None = None, payload: object = None) -> Entry:
    """payload: see `events.digest_of`.

    Raises:
        ConfigError: a key, id or name that is empty or longer than a column. ValueError: JSON with NaN.
    """
    for what, name in (("idempotency key", key), (event.kind, subject_of(event))):
        if name is not None and not (0 < len(name) <= MAX_NAME and name.isprintable()):
            raise ConfigError(f"the {what} {name[:40]!r} must have 1 to {MAX_NAME} characters that can be printed")
    encoded = encode(event)
    return Entry(event, encoded, at, key, digest_of(event, encoded, payload))


def row_of(entry: Entry, event: Event, attempt: int, seq: int) -> EventRow:
    """The row of an event that `Known.judge` let pass."""
    body, data = entry.encoded if event is entry.event else encode(event)
    return EventRow(seq, entry.at, event.kind, VERSION, entry.subject, attempt, entry.key, entry.digest, body, data)


def invalid(event: Event) -> Outcome | None:
    """The refusal of an event that no log could take."""
    if isinstance(event, RewardGiven):
        given = event.utility
        number = isinstance(given, float | int) and not isinstance(given, bool)
        if not (number and math.isfinite(given) and 0 <= given <= 1):
            return Outcome(Status.INVALID, reason=f"the reward is {given!r}; it must be a number in [0, 1]")
    return None


class Known:
    """What the log holds about the entries of a batch; events of the batch itself are added as they are accepted."""

    def __init__(self, rows: Iterable[EventRow] = ()) -> None:
        self._keys: dict[str, EventRow] = {}
        self._subjects: dict[tuple[str, str], list[EventRow]] = {}
        for row in sorted(rows):
            self.add(row)

    def add(self, row: EventRow) -> None:
        """One more event, later than the others."""
        if row.idempotency_key is not None:
            self._keys[row.idempotency_key] = row
        if row.subject is not None:
            self._subjects.setdefault((row.kind, row.subject), []).append(row)

    def judge(self, entry: Entry) -> Outcome | tuple[Event, int]:
        """What to answer, or the event to append and its attempt."""
        if entry.key is not None and (first := self._keys.get(entry.key)) is not None:
            return _replayed(entry, first, f"the idempotency key {entry.key!r} was used for another request")
        subject, event = entry.subject, entry.event
        if subject is None:
            return event, 0
        if isinstance(event, RewardGiven | RewardVoided | DecisionClosed):
            return self._judge_of_decision(entry, event, subject)
        if existing := self._about(event.kind, subject):
            return _replayed(entry, existing[-1], f"{event.kind.replace('_', ' ')} {subject!r} exists and is different")
        return event, 0

    def _judge_of_decision(
        self, entry: Entry, event: RewardGiven | RewardVoided | DecisionClosed, subject: str
    ) -> Outcome | tuple[Event, int]:
        decisions = self._about("decision", subject)
        if not decisions:
            return Outcome(Status.UNKNOWN, reason=f"no decision {subject!r}")
        rewards, voids = self._about("reward", subject), self._about("reward_voided", subject)
        closed = self._about("decision_closed", subject)
        current = rewards[-1] if len(rewards) > len(voids) else None
        if isinstance(event, RewardVoided):
            if current is not None:
                return replace(event, reward_seq=current.seq), len(voids)
            if voids:
                return _replayed(entry, voids[-1], f"the reward of {subject!r} is void already, for another reason")
            return Outcome(Status.CONFLICT, reason=f"decision {subject!r} has no reward to void")
        if isinstance(event, DecisionClosed):
            if closed:
                return _replayed(entry, closed[-1], f"decision {subject!r} was closed for another reason")
            if current is not None:
                return Outcome(Status.CONFLICT, reason=f"decision {subject!r} has a reward; void it before closing")
            return event, 0
        if current is not None:
            return _replayed(entry, current, f"decision {subject!r} has another reward; void it first")
        if closed:
            return Outcome(Status.GONE, reason=f"decision {subject!r} is closed")
        expires_at = json.loads(decisions[0].body)["expires_at"]
        if not rewards and expires_at is not None and entry.at > expires_at:
            return Outcome(Status.GONE, reason=f"decision {subject!r} has expired")
        return event, len(voids)

    def _about(self, kind: str, subject: str) -> list[EventRow]:
        return self._subjects.get((kind, subject), [])


def _replayed(entry: Entry, first: EventRow, otherwise: str) -> Outcome:
    same = first.kind == entry.event.kind and first.digest == entry.digest
    return Outcome(Status.REPLAYED, first) if same else Outcome(Status.CONFLICT, reason=otherwise)
