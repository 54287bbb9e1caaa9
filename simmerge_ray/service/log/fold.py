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
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from simmerge_ray.base.errors import StoreError
from simmerge_ray.service.bandit.policy import Noise
from simmerge_ray.service.bandit.posterior import GaussianPosterior
from simmerge_ray.service.log.events import (
    Activation,
    ArmAdded,
    Discounted,
    EncoderEpoch,
    Event,
    WarmStart,
    check_readable,
    decode,
    read_array,
    read_head,
)

Array = np.ndarray
Encoder = Callable[[int, Array], tuple[Array, float]]
"""(epoch, raw features of one decision) -> its z (d,) and level. The same bits on every replica."""


class EventRow(NamedTuple):
    """An event as the log holds it; fields as the columns of `database.events`."""

    seq: int
    at: float
    kind: str
    version: int
    subject: str | None
    attempt: int
    idempotency_key: str | None
    digest: str
    body: str
    data: bytes

    @property
    def event(self) -> Event:
        """What happened."""
        return decode(self.kind, self.version, self.body, self.data)


@dataclass(frozen=True)
class Basis:
    """What a fold has to know of the events ahead: the last encoder epoch, and the rewards that are voided."""

    epoch: EncoderEpoch | None = None
    epoch_seq: int = 0
    voided: frozenset[int] = frozenset()

    @property
    def number(self) -> int:
        """Of the encoder epoch."""
        return self.epoch.epoch if self.epoch else 0

    def with_event(self, row: EventRow) -> Basis:
        """After one more event."""
        if row.kind == "encoder_epoch":
            event = row.event
            assert isinstance(event, EncoderEpoch)
            return Basis(event, row.seq, self.voided)
        if row.kind == "reward_voided":
            return Basis(self.epoch, self.epoch_seq, self.voided | {voided_seq(row)})
        return self


@dataclass(frozen=True, slots=True)
class OpenDecision:
    """A decision without a reward. features: None where z is of the current epoch."""

    seq: int
    learns: tuple[str, ...]
    level: float
    z: Array
    features: Array | None
    expires_at: float | None


class Arm:
    """Prior and sums of one arm. `posterior` has the bits of `GaussianPosterior.updated`, applied one by one."""

    __slots__ = ("prior", "_precision", "_moment", "_count", "_sum_squares", "_weight", "_posterior", "_product")

    def __init__(self, prior: GaussianPosterior, posterior: GaussianPosterior) -> None:
        self.prior = prior
        self._product = np.empty(prior.precision.shape)
        self._set(posterior)

    def _set(self, posterior: GaussianPosterior) -> None:
        self._precision, self._moment = posterior.precision.copy(), posterior.moment.copy()
        self._count, self._sum_squares = posterior.count, posterior.sum_squares
        self._weight = posterior.weight
        self._posterior: GaussianPosterior | None = posterior

    @property
    def posterior(self) -> GaussianPosterior:
        """The same object until something is learned, so that its factor is computed once."""
        if self._posterior is None:
            self._posterior = GaussianPosterior(
                self._precision.copy(), self._moment.copy(), self._count, self._sum_squares, self._weight
            )
        return self._posterior

    def add(self, z: Array, reward: float) -> None:
        """One observation, in place: a new matrix for each would make a long fold twice as slow."""
        if z.shape != self._moment.shape:
            raise StoreError(f"the log is damaged: a context of {len(z)} dimensions for an arm of {len(self._moment)}")
        np.dot(z[:, None], z[None, :], out=self._product)  # one product an entry, rounded once: the bits of np.outer
        self._precision += self._product
        self._moment += z * reward
        self._count += 1
        self._sum_squares += reward * reward
        self._weight += 1.0
        self._posterior = None

    def discount(self, factor: float) -> None:
        """As `GaussianPosterior.discounted`."""
        self._set(self.posterior.discounted(factor, self.prior))


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
    arms: dict[str, Arm] = field(default_factory=dict)
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

        Raises:
            StoreError: an event was skipped, this program cannot read it, or it does not fit what came before.
        """
        if row.seq != self.seq + 1:
            raise StoreError(f"the log is damaged: event {row.seq} follows event {self.seq}")
        check_readable(row.kind, row.version)
        if row.kind == "decision":
            self._decide(row)
        elif row.kind == "reward":
            if row.seq not in self.basis.voided:
                self._learn(row)
        elif row.kind == "decision_closed":
            self._take(row)
            self.num_closed += 1
        elif self._changes_the_past(row):
            return False
        else:
            self._happen(row.event)
        self.seq = row.seq
        return True

    def _changes_the_past(self, row: EventRow) -> bool:
        if row.kind == "encoder_epoch":
            return row.seq > self.basis.epoch_seq
        return row.kind == "reward_voided" and voided_seq(row) not in self.basis.voided

    def _decide(self, row: EventRow) -> None:
        assert row.subject is not None
        head = read_head(row.body)
        current = head["epoch"] == self.basis.number
        self.open[row.subject] = OpenDecision(
            row.seq,
            tuple(head["learns"]),
            head["level"],
            read_array(head["z"], row.data),
            None if current else read_array(head["features"], row.data),
            head["expires_at"],
        )
        self.num_decisions += 1

    def _learn(self, row: EventRow) -> None:
        decision = self._take(row)
        self.num_rewards += 1
        if not decision.learns:
            return
        z, level = decision.z, decision.level
        if decision.features is not None:
            z, level = self.encode(self.basis.number, decision.features)
        reward = read_head(row.body)["utility"] - level
        for name in decision.learns:
            if name not in self.arms:
                raise StoreError(f"the log is damaged: event {row.seq} rewards the arm {name!r}, which was not added")
            self.arms[name].add(z, reward)

    def _take(self, row: EventRow) -> OpenDecision:
        """The decision that an event is about, which is open no more."""
        decision = self.open.pop(row.subject or "", None)
        if decision is None:
            raise StoreError(f"the log is damaged: event {row.seq} is about {row.subject!r}, which is not open")
        return decision

    def _happen(self, event: Event) -> None:
        if isinstance(event, Discounted):
            for arm in self.arms.values():
                arm.discount(event.factor)
        elif isinstance(event, ArmAdded):
            self._start({event.arm: event.prior}, event.epoch, replace=False)
        elif isinstance(event, WarmStart):
            self._start(event.priors, event.epoch, replace=True)
            self.noise = event.noise if event.epoch == self.basis.number else self.noise
        elif isinstance(event, EncoderEpoch):
            self._start(event.priors, event.epoch, replace=False)
            self.noise = event.noise if event.epoch == self.basis.number else self.noise
            self.model_version = event.model_version
        elif isinstance(event, Activation):
            self.model_version = event.model_version

    def _start(self, priors: Mapping[str, GaussianPosterior], epoch: int, replace: bool) -> None:
        for name, own in priors.items():
            if name not in self.arms or replace:
                prior = own if epoch == self.basis.number else self._prior(name, epoch)
                self.arms[name] = Arm(prior, prior)

    def _prior(self, name: str, epoch: int) -> GaussianPosterior:
        """Of an arm whose own prior is of another epoch."""
        current = self.basis.epoch
        if current is None:
            raise StoreError(f"the log is damaged: it has a prior of epoch {epoch}, which never began")
        return current.priors.get(name) or GaussianPosterior.prior(current.num_dimensions, current.ridge)


def voided_seq(row: EventRow) -> int:
    """Of the reward that a `reward_voided` event takes back."""
    seq: int = read_head(row.body)["reward_seq"]
    return seq


def basis_of(rows: Iterable[EventRow]) -> Basis:
    """Of all events up to a target, or of those of them that change the past."""
    basis = Basis()
    for row in rows:
        basis = basis.with_event(row)
    return basis


def fold(rows: Iterable[EventRow], encode: Encoder) -> State:
    """The state of a whole log: the definition that everything else has to equal to the bit."""
    known = list(rows)
    state = State(basis_of(known), encode)
    for row in known:
        applied = state.apply(row)
        assert applied
    return state
