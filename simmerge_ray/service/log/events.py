"""The events of the log: what happened, as frozen records, and how a row of the database holds them.

A row has `body`, JSON of the fields, and `data`, the arrays of the event as little-endian float64 one after the other;
in the body an array is `{"at": offset, "shape": [...]}`. Numbers in JSON are written so that they read back as the same
float. Every value that goes in therefore comes out bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from simmerge_ray.base.errors import BanditError, StoreError, shown_value
from simmerge_ray.base.storage import canonical_json, digest_bytes
from simmerge_ray.service.bandit.policy import Noise
from simmerge_ray.service.bandit.posterior import GaussianPosterior
from simmerge_ray.service.log.database import RESTORE

OneEvent = TypeVar("OneEvent")
# What reading a damaged event ends in.
DAMAGES = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError, AssertionError)
_REMEDY = f"`simmerge db check DATABASE_URL` looks at all events; {RESTORE}"
VERSION = 1  # of the body's fields, the same for all kinds


def damaged(problem: str) -> StoreError:
    """The error for a log that cannot be folded: what is wrong, and what to do."""
    return StoreError(f"the log is damaged: {problem}; {_REMEDY}")


def unreadable(row: EventRow, error: Exception) -> StoreError:
    """The error for one event that cannot be read."""
    reason = str(error).strip().splitlines()
    said = f"{type(error).__name__}{f': {reason[0][:200]}' if reason else ''}"
    return damaged(f"event {row.seq} ({row.kind!r:.40}) cannot be read ({said})")


class Event:
    """What may happen. kind: its name in the log. about: the field that says what it is about."""

    kind: ClassVar[str]
    about: ClassVar[str | None]

    def __init_subclass__(cls, kind: str, about: str | None = None) -> None:
        cls.kind, cls.about = kind, about

    @property
    def subject(self) -> str | None:
        """What it is about: a second event of its kind would be the same or contradict it."""
        return None if self.about is None else str(getattr(self, self.about))


@dataclass(frozen=True, eq=False)
class DecisionMade(Event, kind="decision", about="decision_id"):
    """An answer to a request.

    request: what was asked, any JSON. features: raw, of any shape, from which a later encoder makes its z; of a kept
    checkpoint the order of its pair in which it comes first stands first. z (d,) and
    level: by the encoder of `epoch`. arms, propensities: that could be played, and how probably; `arm` was. learns:
    arms that its reward is folded into, the played one and those that are identical there; none for a plan of several
    steps. seq_seen: the last event that the decision knew. expires_at: seconds since 1970, after which a first reward
    is refused; None: never. answer: JSON of all that was told, so that a retry is told the same.
    """

    decision_id: str
    request: Mapping[str, Any]
    features: np.ndarray
    z: np.ndarray
    level: float
    epoch: int
    arms: tuple[str, ...]
    propensities: tuple[float, ...]
    arm: str
    learns: tuple[str, ...]
    explored: bool
    seq_seen: int
    model_version: str
    expires_at: float | None = None
    answer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("features", "z"):
            object.__setattr__(self, name, _finite(getattr(self, name), name))
        _finite(self.level, "the level")
        if self.z.ndim != 1:
            raise BanditError(f"z has the shape {self.z.shape}; it must be a vector")
        if len(self.arms) != len(self.propensities):
            raise BanditError(f"{len(self.arms)} arms have {len(self.propensities)} propensities")


@dataclass(frozen=True)
class RewardGiven(Event, kind="reward", about="decision_id"):
    """The measured utility of what a decision chose, in [0, 1]."""

    decision_id: str
    utility: float

    def __post_init__(self) -> None:
        if isinstance(self.utility, int) and not isinstance(self.utility, bool):
            object.__setattr__(self, "utility", float(self.utility))  # 1 and 1.0 are the same reward


@dataclass(frozen=True)
class RewardVoided(Event, kind="reward_voided", about="decision_id"):
    """The reward of a decision was wrong: it counts as if it had never been given. Another may follow."""

    decision_id: str
    reason: str
    reward_seq: int = 0  # of the reward; the log fills it in


@dataclass(frozen=True)
class DecisionClosed(Event, kind="decision_closed", about="decision_id"):
    """No reward will come: the merge was infeasible, was not made, or took too long. Nothing is learned from it."""

    decision_id: str
    reason: str


@dataclass(frozen=True)
class Activation(Event, kind="activation"):
    """From here on another selector answers."""

    model_version: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _text(self.model_version, "the selector's version")


@dataclass(frozen=True, eq=False)
class ArmAdded(Event, kind="arm_added", about="arm"):
    """An arm that may be played from here on. prior: in the contexts of `epoch`."""

    arm: str
    prior: GaussianPosterior
    epoch: int = 0


@dataclass(frozen=True)
class Discounted(Event, kind="discount"):
    """What was observed so far counts `factor` of what it did, in every arm."""

    factor: float
    reason: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise BanditError(f"the discount factor is {self.factor}; it must be above 0 and at most 1")


@dataclass(frozen=True, eq=False)
class EncoderEpoch(Event, kind="encoder_epoch", about="epoch"):
    """From here on contexts come from another encoder, for the past as well: all rewards are folded again with it.

    epoch: its number, never used before; a log starts in epoch 0. num_dimensions, ridge: of the prior of an arm that
    `priors` leaves out, e.g. one that was added meanwhile.
    """

    epoch: int
    num_dimensions: int
    ridge: float
    priors: Mapping[str, GaussianPosterior]
    noise: Noise
    model_version: str

    def __post_init__(self) -> None:
        _text(self.model_version, "the selector's version")
        if self.epoch < 1:
            raise BanditError(f"the epoch is {self.epoch}; a log starts in 0, so it must be 1 or more")
        _one_size([*self.priors.values(), GaussianPosterior.prior(self.num_dimensions, self.ridge)])


@dataclass(frozen=True, eq=False)
class WarmStart(Event, kind="warm_start"):
    """Arms start from labels: these are their priors from here on, and what was learned of them before is replaced."""

    priors: Mapping[str, GaussianPosterior]
    noise: Noise
    epoch: int = 0

    def __post_init__(self) -> None:
        _one_size(list(self.priors.values()))


_CLASSES: dict[str, type[Any]] = {one.kind: one for one in Event.__subclasses__()}

# In the body of a decision what a fold needs comes first; `read_head` stops there, which takes a tenth of the time.
_HEAD = ("learns", "level", "epoch", "expires_at", "z", "features")
_REST = ',"request":'
_ORDER: dict[str, tuple[str, ...]] = {kind: tuple(one.name for one in fields(cls)) for kind, cls in _CLASSES.items()}
_ORDER["decision"] = (*_HEAD, "request", *(name for name in _ORDER["decision"] if name not in (*_HEAD, "request")))
_scan = json.JSONDecoder().raw_decode  # of text that `encode` wrote: half the time of `json.loads`


def is_about_decision(kind: str) -> bool:
    """Whether events of a kind are about a decision."""
    return kind in _CLASSES and _CLASSES[kind].about == "decision_id"


def encode(event: Event) -> tuple[str, bytes]:
    """Body and data of a row. Raises ValueError: a number in a JSON field that is not finite."""
    data = bytearray()
    body = {name: _written(getattr(event, name), data) for name in _ORDER[event.kind]}
    return json.dumps(body, separators=(",", ":"), allow_nan=False), bytes(data)


def decode(kind: str, version: int, body: str, data: bytes) -> Event:
    """The event of a row. Raises StoreError: a kind or version that this program does not know."""
    check_readable(kind, version)
    values = {name: _READ[name](value, data) if name in _READ else value for name, value in json.loads(body).items()}
    event: Event = _CLASSES[kind](**values)
    return event


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
        """What happened. Raises StoreError: the row is damaged, or another version wrote it."""
        try:
            return decode(self.kind, self.version, self.body, self.data)
        except DAMAGES as error:
            raise unreadable(self, error) from error

    def decoded(self, kind: type[OneEvent]) -> OneEvent:
        """What happened, for whoever knows its kind."""
        event = self.event
        assert isinstance(event, kind)
        return event


def read_head(body: str) -> dict[str, Any]:
    """The fields of a body that a fold needs: of a decision those of `_HEAD`, of others all."""
    # A quotation mark inside a string has a backslash before it, so this is found between fields alone.
    end = body.find(_REST)
    head: dict[str, Any] = _scan(body if end < 0 else body[:end] + "}")[0]
    return head


def check_readable(kind: str, version: int, seq: int | None = None) -> None:
    """Raises StoreError for a kind or version that this program does not know: folding on would lose it."""
    if kind not in _CLASSES or version != VERSION:
        which = "an event" if seq is None else f"event {seq},"
        raise StoreError(
            f"the log has {which} {kind!r:.40} of version {version!r:.40}, which another version of simmerge wrote: "
            f"start that one; or the event is damaged, and then {_REMEDY}"
        )


def request_digest(event: Event, encoded: tuple[str, bytes], payload: Any = None) -> str:
    """Of what a client asked for, equal for a retry and for nothing else.

    payload: JSON that a retry repeats, where the event itself would differ (a decision has a new id each time); None
    takes the whole event.
    """
    body, data = encoded if payload is None else (canonical_json(payload), b"")
    return digest_bytes(event.kind.encode(), body.encode(), data)


def voided_seq(row: EventRow) -> int:
    """Number of the reward that a `reward_voided` event takes back. Raises StoreError: the row is damaged."""
    try:
        seq: int = read_head(row.body)["reward_seq"] + 0
    except DAMAGES as error:
        raise unreadable(row, error) from error
    return seq


def read_array(slot: Mapping[str, Any], data: bytes) -> np.ndarray:
    """The array that a slot of the body names. Raises ValueError: the data is too short for it."""
    shape = slot["shape"]
    return np.frombuffer(data, "<f8", math.prod(shape), slot["at"]).reshape(shape)


def write_array(array: np.ndarray, data: bytearray) -> dict[str, Any]:
    """Append an array to the data; the slot to read it by."""
    slot = {"at": len(data), "shape": list(array.shape)}
    data += np.ascontiguousarray(array, dtype="<f8").tobytes()
    return slot


def write_posterior(one: GaussianPosterior, data: bytearray) -> dict[str, Any]:
    """The body of a posterior; its arrays are appended to the data."""
    arrays = {"precision": write_array(one.precision, data), "moment": write_array(one.moment, data)}
    return {**arrays, "count": one.count, "sum_squares": one.sum_squares, "weight": one.weight}


def read_posterior(body: Mapping[str, Any], data: bytes) -> GaussianPosterior:
    """The posterior that `write_posterior` wrote. Raises ValueError: it is none."""
    precision, moment = read_array(body["precision"], data), read_array(body["moment"], data)
    one = GaussianPosterior(precision, moment, body["count"], body["sum_squares"], body["weight"])
    size = one.num_dimensions
    if precision.shape != (size, size) or moment.shape != (size,):
        raise BanditError(f"a posterior has arrays of the shapes {precision.shape} and {moment.shape}")
    if not (np.isfinite(precision).all() and np.isfinite(moment).all() and math.isfinite(one.sum_squares + one.weight)):
        raise BanditError("a posterior has an entry that is not a finite number")
    with np.errstate(over="ignore", invalid="ignore"):
        if size and not np.isfinite(one.mean).all():  # its factor, which is kept: it raises where there is none
            raise BanditError("a posterior has no finite mean")
    return one


def write_noise(noise: Noise | None) -> dict[str, Any] | None:
    """JSON of the noise."""
    return None if noise is None else {"variance": noise.variance, "shape": None}  # shape: of the format alone


def read_noise(body: Mapping[str, Any] | None) -> Noise | None:
    """The noise that `write_noise` wrote."""
    return None if body is None else Noise(body["variance"])


def _written(value: Any, data: bytearray) -> Any:
    if isinstance(value, np.ndarray):
        return write_array(value, data)
    if isinstance(value, GaussianPosterior):
        return write_posterior(value, data)
    if isinstance(value, Noise):
        return write_noise(value)
    if isinstance(value, Mapping) and value and all(isinstance(one, GaussianPosterior) for one in value.values()):
        return {name: write_posterior(one, data) for name, one in value.items()}
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value


_READ: dict[str, Callable[[Any, bytes], Any]] = {
    "features": read_array,
    "z": read_array,
    "arms": lambda value, _: tuple(value),
    "propensities": lambda value, _: tuple(value),
    "learns": lambda value, _: tuple(value),
    "prior": read_posterior,
    "priors": lambda value, data: {arm: read_posterior(one, data) for arm, one in value.items()},
    "noise": lambda value, _: read_noise(value),
}


def _finite(values: Any, what: str) -> np.ndarray:
    """float64, of its own and not writable."""
    array = np.array(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise BanditError(f"{what} has an entry that is not a finite number")
    array.flags.writeable = False
    return array


def _text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise BanditError(f"{what} is {shown_value(value)}; it must be text")


def _one_size(posteriors: list[GaussianPosterior]) -> None:
    sizes = sorted({one.num_dimensions for one in posteriors})
    if len(sizes) > 1:
        raise BanditError(f"the priors have different dimensions: {sizes}")
