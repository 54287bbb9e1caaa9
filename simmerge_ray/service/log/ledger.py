"""What the dashboard shows of decisions: lists, records, and rewards beside an estimate for the best fixed arm.

It folds the log apart from the posteriors, on demand: no decision waits for it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy import Connection, bindparam, select

from simmerge_ray.service import schemas
from simmerge_ray.service.bandit.alarm import regret_slope
from simmerge_ray.service.log.database import events, store_errors
from simmerge_ray.service.log.event_log import ROWS, EventLog
from simmerge_ray.service.log.events import (
    DAMAGES,
    DecisionMade,
    EventRow,
    is_about_decision,
    read_array,
    unreadable,
)
from simmerge_ray.service.log.fold import Course, Decisions, setups_of
from simmerge_ray.service.schemas import DecisionStatus, Refused

_PAGE = 512
_Z95 = 1.96
_NEWEST = (
    select(events.c.seq, events.c.subject)
    .where(events.c.namespace == bindparam("namespace"), events.c.kind == DecisionMade.kind)
    .where(events.c.seq < bindparam("before"))
    .order_by(events.c.seq.desc())
    .limit(bindparam("limit"))
)
_ABOUT = ROWS.where(events.c.subject.in_(bindparam("names", expanding=True))).order_by(events.c.seq)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A drawn decision for a pair. propensity: of the best fixed arm; expected: its reward by the model."""

    played_fixed: bool
    propensity: float
    expected: float

    def fixed(self, utility: float) -> float:
        """Estimate for the best fixed arm, doubly robust."""
        return self.expected + ((utility - self.expected) / self.propensity if self.played_fixed else 0.0)


class Ledger:
    """Rewards of drawn decisions between two arms, in order, and the contexts of the present encoder.

    Thread-safe. Every call reads the log or computes for long, so none belongs in an event loop.
    """

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._decisions: Decisions[_Drawn] = Decisions(self._decided)
        self._contexts: tuple[int, np.ndarray | float, int] = (0, 0.0, 0)  # epoch, sum and number
        self._alarm: tuple[int, schemas.AlarmState | None] = (0, None)
        self._lock = threading.Lock()

    def catch_up(self) -> None:
        """Read what is new. Raises StoreError."""
        with self._lock:
            while rows := self._log.tail(self._decisions.seq, _PAGE):
                for row in rows:
                    self._decisions.apply(row)
                if len(rows) < _PAGE:
                    break

    def mean_context(self, epoch: int) -> np.ndarray | None:
        """(d,): of the decisions of an encoder epoch as of the last `catch_up`; None before the first of them."""
        with self._lock:
            latest, total, count = self._contexts
            return np.asarray(total) / count if count and latest == epoch else None

    def regret(self) -> tuple[schemas.RegretEstimate | None, schemas.AlarmState | None]:
        """Mean reward beside the estimate for the best fixed arm, and whether cumulative regret against it flattens.
        Raises StoreError: what is new cannot be read.
        """
        _, reward, fixed = self._series()
        if len(reward) < 2:
            return None, None
        gain = reward - fixed
        half = _Z95 * float(gain.std(ddof=1)) / len(gain) ** 0.5
        mean = float(gain.mean())
        estimate = schemas.RegretEstimate(
            num=len(reward),
            mean_reward=float(reward.mean()),
            mean_best_fixed=float(fixed.mean()),
            gain=mean,
            interval=(mean - half, mean + half),
        )
        if len(gain) > 1.01 * self._alarm[0]:  # hundreds of resamples: not for every reward of a long log
            self._alarm = (len(gain), regret_slope(-gain))
        return estimate, self._alarm[1]

    def curve(self, points: int) -> schemas.CurveAnswer:
        """Cumulative, thinned out to at most so many points, the last one included. Raises as `regret`."""
        seq, reward, fixed = self._series()
        shown = np.unique(np.linspace(0, len(seq) - 1, min(points, len(seq))).astype(int))
        return schemas.CurveAnswer(
            seq=seq[shown].tolist(),
            reward=np.cumsum(reward)[shown].tolist(),
            best_fixed=np.cumsum(fixed)[shown].tolist(),
            num=len(seq),
        )

    def _series(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers, rewards, and estimates for the best fixed arm."""
        self.catch_up()
        with self._lock:
            courses = self._decisions.courses.values()
            rewarded = [(*one.reward, one.decision.fixed(one.reward[1])) for one in courses if one.reward]
        seq, reward, fixed = zip(*sorted(rewarded), strict=True) if rewarded else ((), (), ())
        return np.array(seq), np.array(reward), np.array(fixed)

    def _decided(self, row: EventRow) -> _Drawn | None:
        """What is kept of a decision; None where it was not drawn, or says nothing of the best fixed arm."""
        body = json.loads(row.body)
        z, (epoch, total, count) = read_array(body["z"], row.data), self._contexts
        if z.size and body["epoch"] >= epoch:
            self._contexts = (body["epoch"], total + z, count + 1) if body["epoch"] == epoch else (body["epoch"], z, 1)
        answer = body.get("answer") or {}
        fixed = answer.get("best_fixed")
        expected = {one["arm"]: one.get("expected") for one in answer.get("arms", ())}
        if not body["explored"] or answer.get("kind") != "pair" or expected.get(fixed) is None:
            return None
        propensity = dict(zip(body["arms"], body["propensities"], strict=True)).get(fixed, 0.0)
        return _Drawn(body["arm"] == fixed, propensity, expected[fixed]) if propensity > 0 else None


def former_versions(log: EventLog) -> set[str]:
    """Versions of all selectors that were ever in force. Raises StoreError."""
    rows = [*log.tail(0, 2), *log.changes_of_the_past(log.head())]  # a log begins with an activation and a warm start
    return {setup.version for setup in setups_of(rows)}


def courses_of(connection: Connection, namespace: str, names: Sequence[str]) -> list[Course[EventRow]]:
    """What became of each of these decisions, in the order of the names."""
    courses = Decisions.of(map(EventRow._make, connection.execute(_ABOUT, {"namespace": namespace, "names": names})))
    return [courses[name] for name in names]


def recent_decisions(log: EventLog, limit: int, before: int | None, now: float) -> schemas.DecisionList:
    """Newest first. Raises StoreError."""
    values = {"namespace": log.namespace, "before": before if before is not None else 2**63 - 1, "limit": limit}
    with store_errors("reading the event log"), log.engine.connect() as connection:
        newest = connection.execute(_NEWEST, values).all()
        courses = courses_of(connection, log.namespace, [name for _, name in newest])
    last = newest[-1].seq if len(newest) == limit else 0
    return schemas.DecisionList(
        decisions=[_row_of(course, now) for course in courses], next_before=last if last > 1 else None
    )


def decision_record(log: EventLog, decision_id: str, now: float) -> schemas.DecisionRecord:
    """A decision with its events. Raises Refused (404), StoreError."""
    rows = [row for row in log.history(decision_id) if is_about_decision(row.kind)]
    course = Decisions.of(rows).get(decision_id)
    if course is None:
        raise Refused(404, f"no decision {decision_id!r}")
    return schemas.DecisionRecord(
        decision=answer_of(course.decision),
        status=status_of(course, now),
        utility=course.utility,
        closed_reason=course.closed_reason,
        events=[schemas.EventSummary(seq=row.seq, at=row.at, kind=row.kind) for row in rows],
    )


def answer_of(row: EventRow) -> schemas.Decision:
    """What was told when the decision was made. Raises StoreError: the row is damaged."""
    try:
        return schemas.Decision.model_validate(json.loads(row.body)["answer"])
    except DAMAGES as error:
        raise unreadable(row, error) from error


def status_of(course: Course[EventRow], now: float) -> DecisionStatus:
    """As the API calls it. Raises StoreError: the row is damaged."""
    try:
        return course.status(json.loads(course.decision.body)["expires_at"], now)
    except DAMAGES as error:
        raise unreadable(course.decision, error) from error


def _row_of(course: Course[EventRow], now: float) -> schemas.DecisionRow:
    row = course.decision
    told = ("decision_id", "kind", "left", "right", "tasks", "arm", "explored")
    try:
        answer = json.loads(row.body)["answer"]
        kept = {name: answer.get(name) for name in told}
        return schemas.DecisionRow(
            **kept, seq=row.seq, at=row.at, status=status_of(course, now), utility=course.utility
        )
    except DAMAGES as error:
        raise unreadable(row, error) from error
