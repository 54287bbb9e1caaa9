"""How long a replica takes to have the state of a long log, from nothing and from a snapshot.

    python -m benchmarks.service.recovery DATABASE_URL [--events 1000000] [--dimensions 64]

DATABASE_URL names an empty database, SQLite or PostgreSQL; a log that this program wrote before, with as many events,
is measured as it is. Half of the events are decisions of the size that the service writes (three arms, raw features and
the answer included), the other half their rewards, each some decisions later. They are written in bulk, past the rules
of `EventLog`. Then each is measured in a process of its own, from an open database to the state: `Replica.catch_up`
without a snapshot, and with one that was saved a thousand events before the end. Threads are pinned to one. Prints JSON
lines.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import uuid
from collections.abc import Iterator
from typing import Any

from benchmarks.measuring import pin_threads, script_parser, timed

pin_threads()

import numpy as np  # noqa: E402
from sqlalchemy import Engine, delete, func, insert, select, text  # noqa: E402

from simmerge_ray.service.bandit.policy import Noise  # noqa: E402
from simmerge_ray.service.bandit.posterior import GaussianPosterior  # noqa: E402
from simmerge_ray.service.log.database import (  # noqa: E402
    events,
    log_head,
    open_database,
    snapshots,
    upgrade_database,
    writing,
)
from simmerge_ray.service.log.event_log import EventLog  # noqa: E402
from simmerge_ray.service.log.events import (  # noqa: E402
    VERSION,
    Activation,
    DecisionMade,
    Event,
    RewardGiven,
    WarmStart,
    encode,
    request_digest,
)
from simmerge_ray.service.log.fold import State, basis_of  # noqa: E402
from simmerge_ray.service.log.replica import PAGE, Replica  # noqa: E402
from simmerge_ray.service.log.snapshots import save_snapshot, snapshot_row  # noqa: E402

NAMESPACE = "default"
ARMS = ("linear", "ties(density=0.2)", "nuslerp")
NUM_FEATURES = 60
NUM_OPEN = 100  # decisions that wait for their reward, about
AFTER_SNAPSHOT = 1000  # events
_CHUNK = 5000  # rows of one transaction
_START = 1_795_000_000.0  # seconds since 1970


def nothing_to_encode(epoch: int, features: np.ndarray, keep: bool) -> tuple[np.ndarray, float]:
    """The log has one encoder epoch, so no context is ever made again."""
    raise AssertionError("there is one epoch only")


def made_up_decision(generator: np.random.Generator, num_dimensions: int) -> DecisionMade:
    """As large as one of the service."""
    name, arm = uuid.UUID(bytes=generator.bytes(16)).hex, ARMS[generator.integers(len(ARMS))]
    asked: dict[str, Any] = {"left": "bank77-lora-1e-3", "right": "clinc-full-3e-5", "tasks": ["banking77", "clinc"]}
    drawn = dict.fromkeys(ARMS, 1 / len(ARMS))
    numbers = generator.uniform(size=(len(ARMS), 6)).tolist()
    told = [
        {"arm": one, "utility": u, "sd": sd, "interval": [low, high], "expected": mean, "expected_sd": mean_sd,
         "propensity": drawn[one]}
        for one, (u, sd, low, high, mean, mean_sd) in zip(ARMS, numbers, strict=True)
    ]  # fmt: skip
    reason = "best fixed arm linear: no other is good enough to leave it; drawn with probability 0.33"
    shared: dict[str, Any] = {"decision_id": name, "arm": arm, "explored": True, "epoch": 0, "seq_seen": 123456}
    shared |= {"expires_at": _START + 1e9, "model_version": "0123456789ab"}
    answer = {"kind": "pair", **asked, **shared, "plan": None, "reason": reason, "overrode": False, "arms": told}
    answer |= {"propensities": drawn, "plans": None, "best_fixed": ARMS[0]}
    answer |= {"distance": generator.uniform(), "limit": generator.uniform()}
    return DecisionMade(
        **shared,
        request={"kind": "pair", **asked},
        features=generator.normal(size=(2, 1, NUM_FEATURES)),
        z=generator.normal(size=num_dimensions),
        level=generator.uniform(0.3, 0.7),
        arms=ARMS,
        propensities=tuple(drawn.values()),
        learns=(arm,),
        answer=answer,
    )


def made_up_events(number: int, num_dimensions: int) -> Iterator[Event]:
    """As many events, which the rules of the log allow in this order."""
    generator, shuffled = np.random.default_rng(number), random.Random(number)
    yield Activation("0123456789ab")
    yield WarmStart({arm: GaussianPosterior.prior(num_dimensions) for arm in ARMS}, Noise(0.01))
    waiting: list[str] = []
    for left in range(number - 2, 0, -1):
        if waiting and (len(waiting) >= left or shuffled.random() < len(waiting) / (2 * NUM_OPEN)):
            place = shuffled.randrange(len(waiting))
            waiting[place], waiting[-1] = waiting[-1], waiting[place]
            yield RewardGiven(waiting.pop(), shuffled.random())
        else:
            decision = made_up_decision(generator, num_dimensions)
            waiting.append(decision.decision_id)
            yield decision


def write_log(engine: Engine, number: int, num_dimensions: int) -> None:
    """Fill an empty database."""
    rows: list[dict[str, Any]] = []
    for seq, event in enumerate(made_up_events(number, num_dimensions), 1):
        body, data = encoded = encode(event)
        row: dict[str, Any] = {"namespace": NAMESPACE, "seq": seq, "at": _START + seq, "kind": event.kind}
        row |= {"version": VERSION, "subject": event.subject, "attempt": 0, "idempotency_key": None}
        rows.append(row | {"digest": request_digest(event, encoded), "body": body, "data": data})
        if len(rows) == _CHUNK or seq == number:
            with writing(engine) as connection:
                connection.execute(insert(events), rows)
            rows = []
    with writing(engine) as connection:
        connection.execute(insert(log_head), [{"namespace": NAMESPACE, "seq": number}])
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))  # as the database does by itself in time


def save_late_snapshot(engine: Engine, number: int) -> None:
    """The state `AFTER_SNAPSHOT` events before the end."""
    log = EventLog(engine)
    state = State(basis_of(log.changes_of_the_past(number)), nothing_to_encode)
    while (left := number - AFTER_SNAPSHOT - state.seq) > 0:
        for row in log.tail(state.seq, min(PAGE, left)):
            state.apply(row)
    save_snapshot(engine, snapshot_row(NAMESPACE, state))
    log.close()


def caught_up(url: str) -> dict[str, Any]:
    """Measured: how long `Replica.catch_up` takes, and what it found."""
    engine = open_database(url)
    log = EventLog(engine)
    view, seconds = timed(Replica(log, nothing_to_encode).catch_up)
    log.close()
    engine.dispose()
    precision = sum(float(one.precision.sum()) for one in view.posteriors.values())
    return {"s": seconds.wall, "cpu_s": seconds.cpu, "state": (view.seq, view.num_rewards, precision)}


def measure(url: str, number: int, num_dimensions: int) -> Iterator[dict[str, Any]]:
    """A line for each way to recover."""
    engine = open_database(url)
    with engine.connect() as connection:
        found = connection.execute(select(func.max(events.c.seq)).where(events.c.namespace == NAMESPACE)).scalar()
    if found is None:
        write_log(engine, number, num_dimensions)
    elif found != number:
        raise SystemExit(f"the log has {found} events, not {number}; name an empty database")
    seen = set()
    for snapshot in (False, True):
        with writing(engine) as connection:
            connection.execute(delete(snapshots))
        if snapshot:
            save_late_snapshot(engine, number)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            one = pool.apply(caught_up, (url,))
        seen.add(one.pop("state"))
        folded = AFTER_SNAPSHOT if snapshot else number
        row = {"database": engine.dialect.name, "events": number, "snapshot": snapshot}
        row |= {name: round(value, 3) for name, value in one.items()}
        yield row | {f"{name[:-1]}us_per_event": round(1e6 * value / folded, 2) for name, value in one.items()}
    assert len(seen) == 1, f"the state differs with a snapshot: {seen}"
    engine.dispose()


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("url", metavar="DATABASE_URL")
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, default=64, help="of the encoder; the bias is one more")
    given = parser.parse_args()
    if given.events < 2 * AFTER_SNAPSHOT:
        parser.error(f"--events must be {2 * AFTER_SNAPSHOT} at least")
    upgrade_database(given.url)
    for line in measure(given.url, given.events, given.dimensions + 1):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
