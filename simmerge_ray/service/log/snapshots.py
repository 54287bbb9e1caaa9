"""Snapshots of the state: they shorten a fold and decide nothing.

A snapshot is a header in JSON and the arrays as raw float64, with a checksum; a damaged one or one of another format is
ignored. A fold may continue from it if nothing in it was changed later: it is of the current encoder epoch, and no
reward up to its number was voided after it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sqlalchemy import Engine, delete, insert, select
from sqlalchemy.exc import IntegrityError

from simmerge_ray.base.errors import StoreError
from simmerge_ray.base.storage import digest_bytes
from simmerge_ray.service.bandit.posterior import RunningPosterior
from simmerge_ray.service.log import events
from simmerge_ray.service.log.database import snapshots, store_errors, writing
from simmerge_ray.service.log.events import EventRow
from simmerge_ray.service.log.fold import Basis, Encoder, OpenDecision, State

FORMAT = 1
KEPT = 8  # snapshots of a namespace: old ones serve voids of old rewards
_COUNTERS = ("seq", "model_version", "num_decisions", "num_rewards", "num_closed")


def dump(state: State) -> bytes:
    """The state as bytes; `load` gives it back bit for bit."""
    data = bytearray()
    arms = [
        {
            "arm": name,
            "prior": events.write_posterior(arm.prior, data),
            "posterior": events.write_posterior(arm.posterior, data),
        }
        for name, arm in state.arms.items()
    ]
    opened = [
        {
            "id": name,
            "seq": one.seq,
            "learns": one.learns,
            "level": one.level,
            "z": events.write_array(one.z, data),
            "features": None if one.features is None else events.write_array(one.features, data),
            "expires_at": one.expires_at,
        }
        for name, one in state.open.items()
    ]
    header = {"format": FORMAT, "arms": arms, "open": opened, "noise": events.write_noise(state.noise)}
    header |= {name: getattr(state, name) for name in _COUNTERS}
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def load(content: bytes, basis: Basis, encode: Encoder) -> State:
    """The dumped state, to continue with a basis that does not change its past.
    Raises StoreError: a snapshot of another format, or one that says what no state can be.
    """
    try:
        state = _loaded(content, basis, encode)
    except events.DAMAGES as error:
        raise StoreError(f"the snapshot cannot be read ({type(error).__name__}: {error})") from error
    sizes = {arm.shape for arm in state.arms.values()}
    if len(sizes) > 1 or not all(one.z.shape in sizes and np.isfinite(one.z).all() for one in _current(state)):
        raise StoreError("the snapshot has arms and contexts of different dimensions")
    return state


def _current(state: State) -> list[OpenDecision]:
    """Open decisions whose contexts are of the current epoch, and are learned from."""
    return [one for one in state.open.values() if one.features is None and one.learns]


def _loaded(content: bytes, basis: Basis, encode: Encoder) -> State:
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    if header["format"] != FORMAT:
        raise StoreError(f"the snapshot has the format {header['format']}; this program reads {FORMAT}")
    kinds = {name: type(header[name]) for name in _COUNTERS}
    if kinds.pop("model_version") not in (str, type(None)) or set(kinds.values()) != {int}:
        raise ValueError(f"its numbers are {kinds}")
    state = State(basis, encode, noise=events.read_noise(header["noise"]), **{name: header[name] for name in _COUNTERS})
    for one in header["arms"]:
        state.arms[one["arm"]] = RunningPosterior(
            events.read_posterior(one["prior"], data), events.read_posterior(one["posterior"], data)
        )
    for one in header["open"]:
        features = None if one["features"] is None else events.read_array(one["features"], data)
        state.open[one["id"]] = OpenDecision(
            one["seq"],
            tuple(one["learns"]),
            one["level"],
            events.read_array(one["z"], data),
            features,
            one["expires_at"],
        )
    return state


def snapshot_row(namespace: str, state: State) -> dict[str, Any]:
    """A state as a row of `snapshots`."""
    content = dump(state)
    return {
        "namespace": namespace,
        "seq": state.seq,
        "epoch_seq": state.basis.epoch_seq,
        "checksum": digest_bytes(content),
        "data": content,
    }


def save_snapshot(engine: Engine, row: Mapping[str, Any]) -> None:
    """Store a snapshot and drop the oldest ones; a second one of the same number is left out. Raises StoreError."""
    own = snapshots.c.namespace == row["namespace"]
    with store_errors("writing a snapshot"):
        try:
            with writing(engine) as connection:
                connection.execute(insert(snapshots), [row])
                newest = select(snapshots.c.seq).where(own).order_by(snapshots.c.seq.desc()).offset(KEPT - 1).limit(1)
                oldest_kept = connection.execute(newest).scalar()
                if oldest_kept is not None:
                    connection.execute(delete(snapshots).where(own, snapshots.c.seq < oldest_kept))
        except IntegrityError:  # another replica was first, with the same bytes
            return


def newest_snapshot(
    engine: Engine, namespace: str, basis: Basis, voids: Sequence[EventRow], last: int, encode: Encoder
) -> State:
    """The newest intact snapshot up to number `last`, as the start of a fold; an empty state if there is none.

    basis: of the events up to `last`. voids: the `reward_voided` events among them.

    Raises StoreError: the database.
    """
    own = snapshots.c.namespace == namespace
    query = select(snapshots.c.seq).where(own, snapshots.c.epoch_seq == basis.epoch_seq, snapshots.c.seq <= last)
    with store_errors("reading snapshots"), engine.connect() as connection:
        for (seq,) in connection.execute(query.order_by(snapshots.c.seq.desc())).all():
            if any(events.voided_seq(void) <= seq < void.seq for void in voids):
                continue
            stored = select(snapshots.c.data, snapshots.c.checksum).where(own, snapshots.c.seq == seq)
            row = connection.execute(stored).one_or_none()
            if row is not None and digest_bytes(row.data) == row.checksum:
                try:
                    state = load(row.data, basis, encode)
                except StoreError:
                    continue
                if state.seq == seq:
                    return state
    return State(basis, encode)
