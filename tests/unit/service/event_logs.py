"""Small events, and logs that are closed at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from simmerge_ray.service.bandit.posterior import GaussianPosterior
from simmerge_ray.service.log.database import open_database
from simmerge_ray.service.log.event_log import EventLog
from simmerge_ray.service.log.events import DecisionMade, EventRow
from simmerge_ray.service.log.fold import Encoder, fold

DIMENSIONS = {0: 3, 1: 4, 2: 3}
ARMS = ("linear", "ties", "slerp")


def encode(epoch: int, features: np.ndarray, keep: bool = False) -> tuple[np.ndarray, float]:
    """A made-up encoder for each epoch."""
    weights = np.random.default_rng(epoch).normal(size=(DIMENSIONS[epoch], features.size))
    z = np.tanh(weights @ features.ravel())
    return z, 0.5 + 0.1 * float(z[0])


def prior(epoch: int = 0, ridge: float = 1.0) -> GaussianPosterior:
    return GaussianPosterior.prior(DIMENSIONS[epoch], ridge, np.full(DIMENSIONS[epoch], 0.125))


def decision(decision_id: str, arm: str = "linear", epoch: int = 0, seed: int = 0, **changes: Any) -> DecisionMade:
    features = np.random.default_rng(seed).normal(size=(2, 5))
    z, level = encode(epoch, features)
    given: dict[str, Any] = {
        "decision_id": decision_id,
        "request": {"left": "a", "right": "b", "seed": seed},
        "features": features,
        "z": z,
        "level": level,
        "epoch": epoch,
        "arms": ARMS,
        "propensities": (0.1, 0.2, 0.7),
        "arm": arm,
        "learns": (arm,),
        "explored": True,
        "seq_seen": 0,
        "model_version": "m0",
    }
    return DecisionMade(**{**given, **changes})


@contextmanager
def opened(url: str, **options: Any) -> Iterator[EventLog]:
    engine = open_database(url)
    log = EventLog(engine, **options)
    try:
        yield log
    finally:
        log.close()
        engine.dispose()


def all_rows(log: EventLog) -> list[EventRow]:
    return log.tail(0, 10**9)


def bits(posteriors: dict[str, GaussianPosterior]) -> dict[str, tuple[Any, ...]]:
    """What is compared where two states have to be equal to the bit."""
    return {
        arm: (
            one.precision.tobytes(),
            one.moment.tobytes(),
            one.count,
            np.float64(one.sum_squares).tobytes(),
            np.float64(one.weight).tobytes(),
        )
        for arm, one in posteriors.items()
    }


def folded_bits(rows: list[EventRow], encoder: Encoder = encode) -> dict[str, tuple[Any, ...]]:
    return bits(dict(fold(rows, encoder).view().posteriors))
