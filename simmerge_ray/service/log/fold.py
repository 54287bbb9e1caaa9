"""The state of the service as the fold of its log: strictly by sequence number, one update for each event.

Three kinds of events change the past, so the fold to a target is defined with knowledge of all events up to there:

- A voided reward is left out, as if it had never been given: its decision is open until another reward comes.
- Contexts are those of the last encoder epoch. Priors of other epochs are replaced by those that this epoch names, and
  decisions of other epochs are encoded again from their raw features, one at a time (a product of matrices would round
  by how many there are). Discounts, warm starts and new arms keep their places.

`Basis` is that knowledge. Events that arrive later and change the past make `State.apply` say so: then the state has to
be folded again, from a snapshot that lies before the change (`replica.Replica`). The cost of a void is the events since
that snapshot; of a new epoch, the whole log. With the same basis and the same events the bits are the same, wherever
the fold was interrupted, so every replica has the same state.

What people are shown and what is judged, exported and trained on comes from two smaller folds: `Decisions`, what became
of each decision, and `setups_of`, which selectors answered. `EFFECTS` says for each kind of event what it does to each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np

from simmerge_ray.plans.keeping import KEEP
from simmerge_ray.service.bandit.policy import Noise
from simmerge_ray.service.bandit.posterior import GaussianPosterior, RunningPosterior
from simmerge_ray.service.log import events
from simmerge_ray.service.log.events import EventRow
from simmerge_ray.service.schemas import DecisionStatus

EXPIRED = "expired"  # the reason with which decisions are closed whose time is over
Encoder = Callable[[int, np.ndarray, bool], tuple[np.ndarray, float]]
"""(epoch, raw features of one decision, whether it keeps the checkpoint that comes first) -> its z (d,) and level. The
same bits on every replica."""
Kept = TypeVar("Kept")


# What became of decisions.


@dataclass(slots=True)
class Course(Generic[Kept]):
    """A decision and what became of it.

    decision: what a view keeps of it. reward: number and utility of the one that counts. num_voids: of rewards that
    were taken back. closed: number and reason.
    """

    decision: Kept
    reward: tuple[int, float] | None = None
    num_voids: int = 0
    closed: tuple[int, str] | None = None

    @property
    def utility(self) -> float | None:
        """Of the reward that counts."""
        return None if self.reward is None else self.reward[1]

    @property
    def closed_reason(self) -> str | None:
        """Why no reward will come."""
        return None if self.closed is None else self.closed[1]

    def take_reward(self, row: EventRow) -> None:
        """A reward was given."""
        self.reward = row.seq, json.loads(row.body)["utility"]

    def take_void(self, row: EventRow) -> None:
        """A reward was taken back."""
        self.num_voids += 1
        if self.reward is not None and self.reward[0] == events.voided_seq(row):
            self.reward = None

    def take_close(self, row: EventRow) -> None:
        """No reward will come."""
        self.closed = row.seq, json.loads(row.body)["reason"]

    def is_late(self, expires_at: float | None, now: float) -> bool:
        """Whether a reward would be the first one, and its time is over."""
        return expires_at is not None and now > expires_at and self.reward is None and not self.num_voids

    def status(self, expires_at: float | None, now: float) -> DecisionStatus:
        """As the API calls it."""
        if self.reward is not None:
            return "rewarded"
        if self.closed is not None:
            return "expired" if self.closed[1] == EXPIRED else "closed"
        return "expired" if self.is_late(expires_at, now) else "open"


class Decisions(Generic[Kept]):
    """Decisions by id and what became of each: the fold of events in order, of which some may be left out.

    keep: what a view needs of a decision; None leaves it out. seq: of the last event.
    """

    def __init__(self, keep: Callable[[EventRow], Kept | None]) -> None:
        self._keep, self.seq = keep, 0
        self.courses: dict[str, Course[Kept]] = {}

    @staticmethod
    def of(rows: Iterable[EventRow]) -> dict[str, Course[EventRow]]:
        """By id, the decisions among these rows, each with what the later rows say of it."""
        decisions = Decisions(lambda row: row)
        for row in rows:
            decisions.apply(row)
        return decisions.courses

    def apply(self, row: EventRow) -> None:
        """The next event, of any kind."""
        take, course = EFFECTS.get(row.kind, _NOTHING).course, self.courses.get(row.subject or "")
        if row.kind == events.DecisionMade.kind:
            try:
                kept = None if row.subject is None else self._keep(row)
            except events.DAMAGES as error:
                raise events.unreadable(row, error) from error
            if row.subject is not None and kept is not None:
                self.courses[row.subject] = Course(kept)
        elif take is not None and course is not None:
            try:
                take(course, row)
            except events.DAMAGES as error:
                raise events.unreadable(row, error) from error
        self.seq = row.seq


# Which selectors answered.


@dataclass(frozen=True)
class Setup:
    """A selector that answered from event `seq` on, and what its arms started from."""

    seq: int = 0
    epoch: int = 0
    version: str = ""
    num_dimensions: int = 0
    priors: Mapping[str, GaussianPosterior] = field(default_factory=dict)
    noise: Noise | None = None

    def after_epoch(self, row: EventRow) -> Setup:
        """Another encoder, with all that belongs to it."""
        event = row.decoded(events.EncoderEpoch)
        return Setup(row.seq, event.epoch, event.model_version, event.num_dimensions, event.priors, event.noise)

    def after_activation(self, row: EventRow) -> Setup:
        """Another selector on the same encoder."""
        event = row.decoded(events.Activation)
        return replace(self, seq=row.seq, version=event.model_version)

    def after_priors(self, row: EventRow) -> Setup:
        """The same selector with other priors."""
        event = row.event
        assert isinstance(event, events.WarmStart | events.ArmAdded)
        if event.epoch != self.epoch:
            return self
        priors = {**self.priors, **(event.priors if isinstance(event, events.WarmStart) else {event.arm: event.prior})}
        size = next(iter(priors.values())).num_dimensions
        noise = event.noise if isinstance(event, events.WarmStart) else self.noise
        return replace(self, num_dimensions=size, priors=priors, noise=noise)


def setups_of(rows: Iterable[EventRow]) -> list[Setup]:
    """Every selector that ever answered, in order; the last is the present one."""
    present = Setup()
    by_seq: dict[int, Setup] = {}
    for row in rows:
        if (change := EFFECTS.get(row.kind, _NOTHING).setup) is not None:
            present = change(present, row)
            by_seq[present.seq] = present
    return [setup for seq, setup in by_seq.items() if seq]


# The state.


@dataclass(frozen=True)
class Basis:
    """What a fold has to know of the events ahead: the last encoder epoch, and the rewards that are voided."""

    epoch: events.EncoderEpoch | None = None
    epoch_seq: int = 0
    voided: frozenset[int] = frozenset()

    @property
    def number(self) -> int:
        """Of the encoder epoch."""
        return self.epoch.epoch if self.epoch else 0

    def with_epoch(self, row: EventRow) -> Basis:
        """After an encoder epoch; the same basis where it is known."""
        if row.seq <= self.epoch_seq:
            return self
        event = row.decoded(events.EncoderEpoch)
        return replace(self, epoch=event, epoch_seq=row.seq)

    def with_void(self, row: EventRow) -> Basis:
        """After a void; the same basis where it is known."""
        seq = events.voided_seq(row)
        return self if seq in self.voided else replace(self, voided=self.voided | {seq})


@dataclass(frozen=True, slots=True)
class OpenDecision:
    """A decision without a reward. features: None where z is of the current epoch."""

    seq: int
    learns: tuple[str, ...]
    level: float
    z: np.ndarray
    features: np.ndarray | None
    expires_at: float | None


@dataclass(frozen=True)
class View:
    """What a decision needs of the state as of event `seq`; it stays as it is when the state goes on.

    posteriors, priors: by arm, in the order in which they came; a discount leaves the prior whole. num_open: decisions
    without a reward that were not closed.
    """

    seq: int
    epoch: int
    model_version: str | None
    noise: Noise | None
    posteriors: Mapping[str, GaussianPosterior]
    priors: Mapping[str, GaussianPosterior]
    num_decisions: int
    num_rewards: int
    num_closed: int
    num_open: int


@dataclass
class State:
    """What the log says up to `seq`. Changed in place by `apply`, and not to be used further where that fails."""

    basis: Basis
    encode: Encoder
    seq: int = 0
    arms: dict[str, RunningPosterior] = field(default_factory=dict)
    open: dict[str, OpenDecision] = field(default_factory=dict)
    noise: Noise | None = None
    model_version: str | None = None
    num_decisions: int = 0
    num_rewards: int = 0
    num_closed: int = 0

    def view(self) -> View:
        """The state of now, to keep."""
        return View(
            self.seq,
            self.basis.number,
            self.model_version,
            self.noise,
            {name: arm.posterior for name, arm in self.arms.items()},
            {name: arm.prior for name, arm in self.arms.items()},
            self.num_decisions,
            self.num_rewards,
            self.num_closed,
            len(self.open),
        )

    def expired(self, now: float) -> list[str]:
        """Open decisions whose time is over; they stay open until somebody logs that they are closed."""
        return [name for name, one in self.open.items() if one.expires_at is not None and one.expires_at < now]

    def apply(self, row: EventRow) -> bool:
        """Fold the next event. False: it changes the past, nothing was done, and the state has to be folded again.
        Raises StoreError: an event was skipped, this program cannot read it, or it does not fit what came before.
        """
        if row.seq != self.seq + 1:
            raise events.damaged(f"event {row.seq} follows event {self.seq}")
        events.check_readable(row.kind, row.version, row.seq)
        effect = EFFECTS[row.kind]
        if effect.basis is not None and effect.basis(self.basis, row) is not self.basis:
            return False
        if effect.state is not None:
            try:
                effect.state(self, row)
            except events.DAMAGES as error:
                raise events.unreadable(row, error) from error
        self.seq = row.seq
        return True

    def pass_over(self, row: EventRow) -> None:
        """Go on behind an epoch that another state answers for. Raises StoreError: an event was skipped."""
        if row.seq != self.seq + 1:
            raise events.damaged(f"event {row.seq} follows event {self.seq}")
        self.seq = row.seq

    # What each kind does to the state: see `EFFECTS`.

    def open_decision(self, row: EventRow) -> None:
        """It waits for its reward."""
        assert row.subject is not None
        head = events.read_head(row.body)
        current = head["epoch"] == self.basis.number
        # Of an epoch that another state answers for (`pass_over`): it is learned from there.
        learns = () if head["epoch"] > self.basis.number else tuple(head["learns"])
        self.open[row.subject] = OpenDecision(
            row.seq,
            learns,
            head["level"],
            events.read_array(head["z"], row.data),
            None if current else events.read_array(head["features"], row.data),
            None if head["expires_at"] is None else head["expires_at"] + 0.0,  # it raises for what is no number
        )
        self.num_decisions += 1

    def learn_reward(self, row: EventRow) -> None:
        """Fold a reward into the arms of its decision, unless it is voided later."""
        if row.seq in self.basis.voided:
            return
        decision = self._take(row)
        self.num_rewards += 1
        if not decision.learns:
            return
        z, level = decision.z, decision.level
        if decision.features is not None:
            z, level = self.encode(self.basis.number, decision.features, KEEP in decision.learns)
        reward = events.read_head(row.body)["utility"] - level
        for name in decision.learns:
            arm = self.arms.get(name)
            if arm is None:
                raise events.damaged(f"event {row.seq} rewards the arm {name!r}, which was not added")
            if z.shape != arm.shape:
                dimensions = f"a context of {len(z)} dimensions for an arm of {arm.shape[0]}"
                raise events.damaged(f"event {row.seq} rewards {dimensions}")
            with np.errstate(over="ignore"):
                is_finite = math.isfinite(z @ z + reward)
            if not is_finite:
                raise events.damaged(f"event {row.seq} has a reward or a context that is not finite")
            arm.add(z, reward)

    def close_decision(self, row: EventRow) -> None:
        """It waits no more."""
        self._take(row)
        self.num_closed += 1

    def discount(self, row: EventRow) -> None:
        """Of all arms."""
        event = row.decoded(events.Discounted)
        for arm in self.arms.values():
            arm.discount(event.factor)

    def add_arm(self, row: EventRow) -> None:
        """An arm that exists already stays as it is."""
        event = row.decoded(events.ArmAdded)
        self._start({event.arm: event.prior}, event.epoch, anew=False)

    def start_arms(self, row: EventRow) -> None:
        """All of them anew, by a warm start."""
        event = row.decoded(events.WarmStart)
        self._start(event.priors, event.epoch, anew=True)
        self.noise = event.noise if event.epoch == self.basis.number else self.noise

    def begin_epoch(self, row: EventRow) -> None:
        """Its encoder is that of the basis already; arms that it brings start."""
        event = row.decoded(events.EncoderEpoch)
        self._start(event.priors, event.epoch, anew=False)
        self.noise = event.noise if event.epoch == self.basis.number else self.noise
        self.model_version = event.model_version

    def activate(self, row: EventRow) -> None:
        """Another selector answers."""
        event = row.decoded(events.Activation)
        self.model_version = event.model_version

    def _take(self, row: EventRow) -> OpenDecision:
        """The decision that an event is about, which is open no more."""
        decision = self.open.pop(row.subject or "", None)
        if decision is None:
            raise events.damaged(f"event {row.seq} is about {row.subject!r}, which is not open")
        return decision

    def _start(self, priors: Mapping[str, GaussianPosterior], epoch: int, anew: bool) -> None:
        if epoch > self.basis.number:  # of which another state answers
            return
        for name, own in priors.items():
            if name not in self.arms or anew:
                prior = own if epoch == self.basis.number else self._prior(name, epoch)
                self.arms[name] = RunningPosterior(prior, prior)

    def _prior(self, name: str, epoch: int) -> GaussianPosterior:
        """Of an arm whose own prior is of another epoch."""
        current = self.basis.epoch
        if current is None:
            raise events.damaged(f"it has a prior of epoch {epoch}, which never began")
        return current.priors.get(name) or GaussianPosterior.prior(current.num_dimensions, current.ridge)


@dataclass(frozen=True)
class Effect:
    """What a kind of event means to each fold; None: nothing.

    state: to the posteriors. basis: to what a fold knows beforehand: such events change the past, and the index of
    `database.CHANGES_OF_THE_PAST` finds them. course: to the decision that it is about. setup: to which selector
    answers, with what.
    """

    state: Callable[[State, EventRow], None] | None = None
    basis: Callable[[Basis, EventRow], Basis] | None = None
    course: Callable[[Course[Any], EventRow], None] | None = None
    setup: Callable[[Setup, EventRow], Setup] | None = None


_NOTHING = Effect()  # of a kind that another version wrote; `State.apply` refuses it
EFFECTS: Mapping[str, Effect] = {
    events.DecisionMade.kind: Effect(State.open_decision),
    events.RewardGiven.kind: Effect(State.learn_reward, course=Course.take_reward),
    events.RewardVoided.kind: Effect(basis=Basis.with_void, course=Course.take_void),
    events.DecisionClosed.kind: Effect(State.close_decision, course=Course.take_close),
    events.Activation.kind: Effect(State.activate, setup=Setup.after_activation),
    events.ArmAdded.kind: Effect(State.add_arm, setup=Setup.after_priors),
    events.Discounted.kind: Effect(State.discount),
    events.EncoderEpoch.kind: Effect(State.begin_epoch, basis=Basis.with_epoch, setup=Setup.after_epoch),
    events.WarmStart.kind: Effect(State.start_arms, setup=Setup.after_priors),
}


def basis_of(rows: Iterable[EventRow]) -> Basis:
    """Of all events up to a target, or of those of them that change the past."""
    basis = Basis()
    for row in rows:
        if (change := EFFECTS.get(row.kind, _NOTHING).basis) is not None:
            basis = change(basis, row)
    return basis


def fold(rows: Iterable[EventRow], encode: Encoder) -> State:
    """The state of a whole log: the definition that everything else has to equal to the bit."""
    known = list(rows)
    state = State(basis_of(known), encode)
    for row in known:
        applied = state.apply(row)
        assert applied
    return state
