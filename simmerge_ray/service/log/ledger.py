"""What the log says of decisions, for people: lists, records, and rewards beside an estimate for the best fixed arm.

A fold of its own, beside that of the posteriors: it is asked for now and then, and a decision never waits for it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sqlalchemy import bindparam, select

from simmerge_ray.service.bandit.alarm import regret_slope
from simmerge_ray.service.log.database import events, store_errors
from simmerge_ray.service.log.event_log import EventLog
from simmerge_ray.service.log.events import read_array
from simmerge_ray.service.log.fold import EventRow, voided_seq
from simmerge_ray.service.schemas import (
    AlarmState,
    CurveAnswer,
    Decision,
    DecisionList,
    DecisionRecord,
    DecisionRow,
    EventSummary,
    Refused,
    RegretEstimate,
)

Array = np.ndarray
EXPIRED = "expired"  # the reason with which decisions are closed whose time is over
_PAGE = 512
_Z95 = 1.96
_ROWS = select(*(events.c[name] for name in EventRow._fields)).where(events.c.namespace == bindparam("namespace"))
_NEWEST = _ROWS.where(events.c.kind == "decision", events.c.seq < bindparam("before"))
_NEWEST = _NEWEST.order_by(events.c.seq.desc()).limit(bindparam("limit"))
_ABOUT = _ROWS.where(events.c.subject.in_(bindparam("names", expanding=True)), events.c.kind != "decision")
_ABOUT = _ABOUT.order_by(events.c.seq)


@dataclass
class _Open:
    """What is needed of a decision when its reward comes. fixed: estimate for the best fixed arm without the reward."""

    played_fixed: bool
    propensity: float
    fixed: float


@dataclass
class Ledger:
    """Rewards of drawn decisions between two arms, in order, and the contexts of the present encoder.

    Threads may share it; all of it reads the log or computes for long, so none of it belongs into an event loop.
    """

    log: EventLog
    _seq: int = 0
    _decisions: dict[str, _Open] = field(default_factory=dict)
    _rewards: dict[int, tuple[float, float]] = field(default_factory=dict)
    _epoch: int = 0
    _sum_z: Array | None = None
    _num_z: int = 0
    _alarm: tuple[int, AlarmState | None] = (0, None)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def catch_up(self) -> None:
        """Read what is new. Raises StoreError."""
        with self._lock:
            while rows := self.log.tail(self._seq, _PAGE):
                for row in rows:
                    self._apply(row)
                    self._seq = row.seq
                if len(rows) < _PAGE:
                    break

    def mean_context(self, epoch: int) -> Array | None:
        """(d,): of the decisions of an encoder epoch as of the last `catch_up`; None before the first of them."""
        with self._lock:
            if self._sum_z is None or self._epoch != epoch:
                return None
            result: Array = self._sum_z / self._num_z
            return result

    def regret(self) -> tuple[RegretEstimate | None, AlarmState | None]:
        """Mean reward beside the estimate for the best fixed arm, and whether cumulative regret against it flattens.

        Raises:
            StoreError: what is new cannot be read.
        """
        _, reward, fixed = self._series()
        if len(reward) < 2:
            return None, None
        gain = reward - fixed
        half = _Z95 * float(gain.std(ddof=1)) / len(gain) ** 0.5
        mean = float(gain.mean())
        estimate = RegretEstimate(
            num=len(reward),
            mean_reward=float(reward.mean()),
            mean_best_fixed=float(fixed.mean()),
            gain=mean,
            interval=(mean - half, mean + half),
        )
        if len(gain) > 1.01 * self._alarm[0]:  # hundreds of resamples: not for every reward of a long log
            found, alarm = regret_slope(-gain), None
            if found is not None:
                alarm = AlarmState(linear=found.linear, slope=found.slope, low=found.low, high=found.high)
            self._alarm = (len(gain), alarm)
        return estimate, self._alarm[1]

    def curve(self, points: int) -> CurveAnswer:
        """Cumulative, thinned out to at most so many points, the last one included. Raises as `regret`."""
        seq, reward, fixed = self._series()
        shown = (
            np.unique(np.linspace(0, len(seq) - 1, min(points, len(seq))).astype(int)) if len(seq) else np.zeros(0, int)
        )
        total, other = np.cumsum(reward), np.cumsum(fixed)
        return CurveAnswer(
            seq=[int(seq[i]) for i in shown],
            reward=[float(total[i]) for i in shown],
            best_fixed=[float(other[i]) for i in shown],
            num=len(seq),
        )

    def _series(self) -> tuple[Array, Array, Array]:
        self.catch_up()
        with self._lock:
            seq = sorted(self._rewards)
            values = np.array([self._rewards[one] for one in seq]).reshape(-1, 2)
        return np.array(seq), values[:, 0], values[:, 1]

    def _apply(self, row: EventRow) -> None:
        if row.kind == "decision":
            body = json.loads(row.body)
            z = read_array(body["z"], row.data)
            if z.size and body["epoch"] == self._epoch:
                self._sum_z, self._num_z = z if self._sum_z is None else self._sum_z + z, self._num_z + 1
            if (one := _drawn_pair(body)) is not None:
                self._decisions[body["decision_id"]] = one
        elif row.kind == "reward" and row.subject in self._decisions:
            one, utility = self._decisions[row.subject], json.loads(row.body)["utility"]
            correction = (utility - one.fixed) / one.propensity if one.played_fixed else 0.0
            self._rewards[row.seq] = (utility, one.fixed + correction)
        elif row.kind == "encoder_epoch":
            self._epoch, self._sum_z, self._num_z = json.loads(row.body)["epoch"], None, 0
        elif row.kind == "reward_voided":
            self._rewards.pop(voided_seq(row), None)
        elif row.kind == "decision_closed" and row.subject is not None:
            self._decisions.pop(row.subject, None)


def _drawn_pair(body: dict[str, Any]) -> _Open | None:
    """None for a decision that was not drawn, or says nothing of the best fixed arm."""
    answer = body.get("answer") or {}
    fixed = answer.get("best_fixed")
    expected = {one["arm"]: one.get("expected") for one in answer.get("arms", ())}
    if not body["explored"] or answer.get("kind") != "pair" or expected.get(fixed) is None:
        return None
    propensity = dict(zip(body["arms"], body["propensities"], strict=True)).get(fixed, 0.0)
    return _Open(body["arm"] == fixed, propensity, expected[fixed]) if propensity > 0 else None


def former_versions(log: EventLog) -> set[str]:
    """Versions of all selectors that were ever in force. Raises StoreError."""
    rows = [*log.tail(0, 2), *log.changes_of_the_past(log.head())]  # a log begins with an activation and a warm start
    return {json.loads(row.body)["model_version"] for row in rows if row.kind in ("activation", "encoder_epoch")}


def recent_decisions(log: EventLog, limit: int, before: int | None, now: float) -> DecisionList:
    """Newest first. Raises StoreError."""
    last = before if before is not None else 2**63 - 1
    with store_errors("reading the event log"), log.engine.connect() as connection:
        own = {"namespace": log.namespace}
        rows = [EventRow._make(one) for one in connection.execute(_NEWEST, {**own, "before": last, "limit": limit})]
        names = [row.subject for row in rows]
        others = connection.execute(_ABOUT, {**own, "names": names}).all() if names else []
    about: dict[str | None, list[EventRow]] = {}
    for one in map(EventRow._make, others):
        about.setdefault(one.subject, []).append(one)
    shown = [_row_of(row, about.get(row.subject, []), now) for row in rows]
    return DecisionList(decisions=shown, next_before=rows[-1].seq if len(rows) == limit and rows[-1].seq > 1 else None)


def decision_record(log: EventLog, decision_id: str, now: float) -> DecisionRecord:
    """A decision with its events. Raises Refused (404), StoreError."""
    rows = [row for row in log.history(decision_id) if row.kind in _OF_DECISIONS]
    decisions = [row for row in rows if row.kind == "decision"]
    if not decisions:
        raise Refused(404, f"no decision {decision_id!r}")
    status, utility, reason = state_of(decisions[0], rows, now)
    return DecisionRecord(
        decision=answer_of(decisions[0]),
        status=status,
        utility=utility,
        closed_reason=reason,
        events=[EventSummary(seq=row.seq, at=row.at, kind=row.kind) for row in rows],
    )


_OF_DECISIONS = ("decision", "reward", "reward_voided", "decision_closed")


def answer_of(row: EventRow) -> Decision:
    """What was told when the decision was made."""
    return Decision.model_validate(json.loads(row.body)["answer"])


def _row_of(row: EventRow, others: Sequence[EventRow], now: float) -> DecisionRow:
    answer = json.loads(row.body)["answer"]
    status, utility, _ = state_of(row, others, now)
    kept = {name: answer.get(name) for name in ("decision_id", "kind", "left", "right", "tasks", "arm", "explored")}
    return DecisionRow(**kept, seq=row.seq, at=row.at, status=status, utility=utility)


def state_of(decision: EventRow, rows: Sequence[EventRow], now: float) -> tuple[Any, float | None, str | None]:
    """Status, utility, and why it was closed."""
    voided = {voided_seq(row) for row in rows if row.kind == "reward_voided"}
    given = [row for row in rows if row.kind == "reward" and row.seq not in voided]
    if given:
        return "rewarded", json.loads(given[-1].body)["utility"], None
    for row in rows:
        if row.kind == "decision_closed":
            reason = json.loads(row.body)["reason"]
            return ("expired" if reason == EXPIRED else "closed"), None, reason
    expires_at = json.loads(decision.body)["expires_at"]
    late = expires_at is not None and now > expires_at and not any(row.kind == "reward" for row in rows)
    return ("expired" if late else "open"), None, None
