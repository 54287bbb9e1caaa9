"""How long rewards wait while a new encoder epoch is folded.

    python -m benchmarks.service.epoch DATABASE_URL [--events 100000] [--rate 100] [--dimensions 16]

DATABASE_URL names an empty database, or the log that an earlier call wrote (`benchmarks.service.recovery`). One replica
decides and takes rewards, each as often as `--rate` a second, whether or not the earlier ones are answered (an open
loop: what waits is counted from when it was due). After some seconds of that an epoch begins, whose encoder makes every
context of the log anew; the load goes on until it is in force. Prints the rewards' p50, p99 and longest before and
meanwhile, how long it took, and how long the fold takes that nothing else disturbs, which is what rewards waited before
it was done beside. Threads are pinned to one.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from dataclasses import replace
from typing import Any

from benchmarks.measuring import pin_threads, script_parser, timed

pin_threads()

import numpy as np  # noqa: E402

from benchmarks.service.recovery import NUM_FEATURES, made_up_decision, write_log  # noqa: E402
from simmerge_ray.service.bandit.policy import Noise  # noqa: E402
from simmerge_ray.service.log.database import open_database, upgrade_database  # noqa: E402
from simmerge_ray.service.log.event_log import EventLog  # noqa: E402
from simmerge_ray.service.log.events import DecisionMade, EncoderEpoch, RewardGiven  # noqa: E402
from simmerge_ray.service.log.replica import Replica  # noqa: E402

_USUAL_S = 15.0  # of load before the epoch


def encoder(num_dimensions: int) -> Any:
    """Two layers of the selectors' size, and what no epoch but 0 has: another matrix for each."""

    def encode(epoch: int, features: np.ndarray, keep: bool) -> tuple[np.ndarray, float]:
        generator = np.random.default_rng(epoch)
        if epoch not in matrices:
            shapes = ((NUM_FEATURES, 32), (32, num_dimensions))
            matrices[epoch] = [generator.normal(size=shape) / shape[0] ** 0.5 for shape in shapes]
        z = features[:, 0].mean(0)
        for matrix in matrices[epoch]:
            z = np.maximum(z @ matrix, 0.0)
        return z, 0.5

    matrices: dict[int, list[np.ndarray]] = {}
    return encode


class Load:
    """Decisions and rewards at a rate, until it is stopped. waits: (when it was due, seconds) of each reward."""

    def __init__(self, log: EventLog, rate: float, num_dimensions: int) -> None:
        self._log, self._rate, self._size = log, rate, num_dimensions
        self._generator = np.random.default_rng(1)
        self._decided: deque[str] = deque()
        self._stopped = threading.Event()
        self.waits: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    async def _run(self) -> None:
        due = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            while not self._stopped.is_set():
                tasks.create_task(self._decide(made_up_decision(self._generator, self._size)))
                if len(self._decided) > 1:
                    tasks.create_task(self._reward(self._decided.popleft(), due))
                due += 1 / self._rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))

    async def _decide(self, decision: DecisionMade) -> None:
        """As the service does: an event that is made of the view that the log's own thread looks at."""
        await self._log.append_made(lambda view: replace(decision, epoch=view.epoch), None, decision.decision_id)
        self._decided.append(decision.decision_id)

    async def _reward(self, name: str, due: float) -> None:
        await self._log.append_async(RewardGiven(name, 0.5))
        self.waits.append((due, time.perf_counter() - due))


def shown(waits: list[float]) -> dict[str, float]:
    """In milliseconds."""
    figures = dict(zip(("p50", "p99", "longest"), np.quantile(waits, [0.5, 0.99, 1.0]), strict=True))
    return {"num": len(waits)} | {name: round(1000 * float(value), 2) for name, value in figures.items()}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("database")
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--dimensions", type=int, default=16)
    options = parser.parse_args()
    upgrade_database(options.database)
    engine = open_database(options.database)
    encode = encoder(options.dimensions)
    holder: list[Replica] = []
    log = EventLog(engine, look=lambda: holder[0].catch_up())
    if log.head() == 0:
        write_log(engine, options.events, options.dimensions)
    holder.append(Replica(log, encode))
    epoch = holder[0].catch_up().epoch + 1
    holder[0].save_snapshot()
    load = Load(log, options.rate, options.dimensions)
    time.sleep(_USUAL_S)
    begun = time.perf_counter()
    log.append(EncoderEpoch(epoch, options.dimensions, 1.0, {}, Noise(0.01), f"m{epoch}"))
    while holder[0].catch_up().epoch != epoch:
        time.sleep(0.05)
    ended = time.perf_counter()
    load.stop()
    usual = shown([wait for due, wait in load.waits if due < begun])
    beside = shown([wait for due, wait in load.waits if begun <= due < ended])
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM snapshots")
    _, alone = timed(Replica(log, encode).catch_up)
    ratio = round(beside["longest"] / usual["p99"], 2)
    row = {"events": log.head(), "rate": options.rate, "usual": usual, "while folded": beside}
    row |= {"seconds beside": round(ended - begun, 1), "longest / usual p99": ratio}
    print(json.dumps(row | {"alone_s": round(alone.wall, 2), "alone_cpu_s": round(alone.cpu, 2)}))
    holder[0].close()
    log.close()


if __name__ == "__main__":
    main()
