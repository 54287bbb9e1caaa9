"""Kill the service with -9 again and again under load: is anything lost that it acknowledged, or counted twice?

    python -m benchmarks.service.soak DATABASE --run RUN [--kills 500] [--jobs 12] [--seed 0]

DATABASE is `sqlite`, `postgresql` (a server is started for it) or the URL of an empty database; RUN the directory of
a finished `simmerge demo`. The service is the plain process of `simmerge serve --no-ray`. Every
job decides, and then rewards, voids and rewards again, closes, or does nothing; each of these requests goes out 1 to 5
times at once with one idempotency key, and again until it is acknowledged, over as many deaths as it takes. Kills
come at any time: while the service starts, folds or commits.

At the end, with everything acknowledged, the log must hold exactly what was: no event less, none more and none twice. A
replica's state, from snapshots and from nothing, must equal to the bit the definition of the fold, and the posteriors
that `GaussianPosterior.updated` makes of the acknowledged rewards. Prints JSON; exit code 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.measuring import script_parser
from benchmarks.service.running import TOKEN, PlainService, database_of
from simmerge_ray.base.config import ServeConfig
from simmerge_ray.base.runs import RunLayout
from simmerge_ray.service.bandit.posterior import GaussianPosterior
from simmerge_ray.service.log.database import open_database, upgrade_database
from simmerge_ray.service.log.event_log import EventLog
from simmerge_ray.service.log.events import DecisionMade, EventRow
from simmerge_ray.service.log.fold import State, fold
from simmerge_ray.service.log.replica import Replica

Campaign = Callable[[argparse.Namespace, str, Path, int], dict[str, Any]]
MAX_COPIES = 5
_LONGEST_LIFE_S = 1.0  # of the service, from its start
_GIVE_UP_S = 900.0  # a whole cluster may have to start, more than once
_OURS = "x-content-type-options"  # a header of all that the service itself answers; Ray Serve's proxies do not set it


class Acknowledged:
    """What the service said was done. Each entry: what, about which decision -> what was told."""

    def __init__(self) -> None:
        self.decisions: dict[str, str] = {}  # id by key
        self.events: dict[int, tuple[str, str, float | None]] = {}  # by number: kind, id, utility
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.decisions) + len(self.events)

    def check(self, right: bool, problem: str) -> None:
        if not right:
            self.wrong.append(problem)


class Load:
    """Jobs that talk to a service which dies all the time."""

    def __init__(self, client: httpx.AsyncClient, checkpoints: list[str], seed: int) -> None:
        self._client, self._checkpoints, self._random = client, checkpoints, random.Random(seed)
        self.acknowledged = Acknowledged()
        self.ending = False

    async def work(self) -> None:
        """One job after the other, until the end."""
        while not self.ending:
            await self._job()

    async def _job(self) -> None:
        one, left_right = self.acknowledged, self._random.sample(self._checkpoints, 2)
        key = uuid.uuid4().hex
        body = {"left": left_right[0], "right": left_right[1], "explore": self._random.random() < 0.9}
        answers = await self._surely("/v1/decisions", body, key)
        names = {answer["decision_id"] for answer in answers}
        one.check(len(names) == 1, f"one key, several decisions: {names}")
        decision = names.pop()
        one.decisions[key] = decision
        await asyncio.sleep(self._random.expovariate(20))
        what = self._random.random()
        if what < 0.8:
            await self._reward(decision)
        if what < 0.15:
            await self._about(decision, "reward_voided", "void", {"reason": "mistyped"})
            if what < 0.1:
                await self._reward(decision)
        elif 0.8 <= what < 0.9:
            await self._about(decision, "decision_closed", "close", {"reason": "infeasible: made up"})
            await self._refused(decision, 410)

    async def _reward(self, decision: str) -> None:
        utility = self._random.random()
        await self._about(decision, "reward", "reward", {"utility": utility}, utility)
        if self._random.random() < 0.1:
            await self._refused(decision, 409)

    async def _about(
        self, decision: str, kind: str, verb: str, body: Mapping[str, Any], utility: float | None = None
    ) -> None:
        key = uuid.uuid4().hex
        answers = await self._surely(f"/v1/decisions/{decision}/{verb}", body, key)
        numbers = {answer["seq"] for answer in answers}
        self.acknowledged.check(len(numbers) == 1, f"one {kind}, several events: {numbers}")
        self.acknowledged.check(not numbers & set(self.acknowledged.events), f"an event is told twice: {numbers}")
        self.acknowledged.events[numbers.pop()] = (kind, decision, utility)

    async def _refused(self, decision: str, status: int) -> None:
        """Another reward of a decision that takes none."""
        while True:
            answer = await self._once(f"/v1/decisions/{decision}/reward", {"utility": 2.0**-40}, uuid.uuid4().hex)
            if answer is not None and answer.status_code != 503:
                self.acknowledged.check(answer.status_code == status, f"{answer.status_code} instead of {status}")
                return
            await asyncio.sleep(0.05)

    async def _surely(self, path: str, body: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
        """All acknowledgements of one request: sent several times at once, and again until there is one."""
        deadline, good, pause = time.monotonic() + _GIVE_UP_S, list[dict[str, Any]](), 0.05
        while not good:
            copies = self._random.randint(1, MAX_COPIES)
            for answer in await asyncio.gather(*(self._once(path, body, key) for _ in range(copies))):
                if answer is None:
                    self.acknowledged.counts["lost on the way"] += 1
                elif answer.status_code in (200, 201):
                    good.append(answer.json())
                    self.acknowledged.counts[f"answered {answer.status_code}"] += 1
                else:
                    self.acknowledged.counts[f"answered {answer.status_code}"] += 1
                    self.acknowledged.check(answer.status_code == 503, f"{path}: {answer.status_code} {answer.text}")
            if not good:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{path} was not acknowledged within {_GIVE_UP_S:.0f} s")
                await asyncio.sleep(pause)
                pause = min(1.0, 1.5 * pause)
        return good

    async def _once(self, path: str, body: Mapping[str, Any], key: str) -> httpx.Response | None:
        """What the service answered; None where it is not known whether the request came to it."""
        try:
            answer = await self._client.post(path, json=body, headers={"Idempotency-Key": key})
        except httpx.TransportError:
            return None
        return answer if _OURS in answer.headers else None


async def under_load(
    url: str, jobs: int, seed: int, disturb: Callable[[Acknowledged], Awaitable[None]]
) -> tuple[Acknowledged, dict[str, Any]]:
    """Ask a service that is ready while something disturbs it; when that is over, and the service ready again, all jobs
    end. What was acknowledged, and what the service says of its state then.
    """
    limits = httpx.Limits(max_connections=jobs * MAX_COPIES, max_keepalive_connections=jobs)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30, limits=limits) as client:
        catalogue = (await client.get("/v1/catalogue")).json()
        load = Load(client, [one["id"] for one in catalogue["checkpoints"]], seed)
        tasks = [asyncio.create_task(load.work()) for _ in range(jobs)]
        await disturb(load.acknowledged)
        await asyncio.sleep(1)
        load.ending = True
        await asyncio.gather(*tasks)
        return load.acknowledged, (await client.get("/v1/policy")).json()


async def _campaign(service: PlainService, kills: int, jobs: int, seed: int) -> tuple[Acknowledged, dict[str, Any]]:
    """Kill, start, kill."""
    generator = random.Random(seed + 1)
    ready: list[float] = []

    async def disturb(_: Acknowledged) -> None:
        for number in range(kills):
            if number % 4:  # else it may die before it is ready
                ready.append(await asyncio.to_thread(service.wait))
            await asyncio.sleep(generator.uniform(0, _LONGEST_LIFE_S))
            service.kill()
            service.start()
        ready.append(await asyncio.to_thread(service.wait))

    service.start()
    await asyncio.to_thread(service.wait)
    told, policy = await under_load(service.url, jobs, seed, disturb)
    policy["seconds until ready"] = {"median": float(np.median(ready)), "largest": max(ready)}
    return told, policy


def _never(epoch: int, features: np.ndarray) -> tuple[np.ndarray, float]:
    raise AssertionError("there is one encoder epoch")


def _bits(posteriors: Mapping[str, GaussianPosterior]) -> dict[str, tuple[object, ...]]:
    return {
        arm: (one.precision.tobytes(), one.moment.tobytes(), one.count, one.sum_squares.hex(), one.weight.hex())
        for arm, one in posteriors.items()
    }


def _expected(start: State, rows: list[EventRow], rewards: Mapping[int, tuple[str, float]]) -> dict[str, Any]:
    """Posteriors from acknowledged rewards alone: by number, each as one `GaussianPosterior.updated`."""
    decisions = {row.subject: row.event for row in rows if row.kind == "decision"}
    posteriors = {name: arm.prior for name, arm in start.arms.items()}
    for seq in sorted(rewards):
        name, utility = rewards[seq]
        decision = decisions[name]
        assert isinstance(decision, DecisionMade)
        for arm in decision.learns:
            posteriors[arm] = posteriors[arm].updated(decision.z, utility - decision.level)
    return posteriors


def verify(url: str, told: Acknowledged, policy: Mapping[str, Any]) -> list[str]:
    """What is wrong with a log, beside what was acknowledged; nothing."""
    wrong = list(told.wrong)
    engine = open_database(url)
    log = EventLog(engine)
    rows = log.tail(0, 10**9)
    recovered = Replica(log, _never).catch_up()  # by the service's own snapshots
    log.close()
    engine.dispose()
    if [row.seq for row in rows] != list(range(1, len(rows) + 1)):
        wrong.append("the numbers have gaps")
    stored = {row.idempotency_key: row.subject for row in rows if row.kind == "decision"}
    num_decisions = sum(row.kind == "decision" for row in rows)
    lost = {key for key, name in told.decisions.items() if stored.get(key) != name}
    others = {
        row.seq: (row.kind, row.subject, json.loads(row.body)["utility"] if row.kind == "reward" else None)
        for row in rows
        if row.kind in ("reward", "reward_voided", "decision_closed")
    }
    lost_events = [seq for seq, event in told.events.items() if others.get(seq) != event]
    wrong += [f"lost decision {told.decisions[key]}" for key in lost] + [f"lost event {seq}" for seq in lost_events]
    if num_decisions != len(told.decisions) or len(others) != len(told.events):
        wrong.append(f"{num_decisions} decisions and {len(others)} other events, told: "
                     f"{len(told.decisions)} and {len(told.events)}")  # fmt: skip
    given: dict[str, list[int]] = defaultdict(list)
    for seq, (kind, name, _) in sorted(told.events.items()):
        if kind == "reward":
            given[name].append(seq)
        elif kind == "reward_voided":
            given[name].pop()
    wrong += [f"decision {name} is rewarded twice" for name, seqs in given.items() if len(seqs) > 1]
    valid = {seq: (name, told.events[seq][2] or 0.0) for name, seqs in given.items() for seq in seqs}
    state = fold(rows, _never)
    if _bits(state.view().posteriors) != _bits(recovered.posteriors):
        wrong.append("what a replica recovers is not the fold of the log")
    if _bits(_expected(state, rows, valid)) != _bits(recovered.posteriors):
        wrong.append("the posterior is not that of the acknowledged rewards")
    if (policy["num_decisions"], policy["num_rewards"], policy["seq"]) != (num_decisions, len(valid), len(rows)):
        wrong.append(f"the service says {policy['num_decisions']}, {policy['num_rewards']}, {policy['seq']}")
    counts = {one["arm"]: one["count"] for one in policy["arms"]}
    if counts != {arm: one.count for arm, one in recovered.posteriors.items()}:
        wrong.append(f"the service has learned {counts}")
    return wrong


def soak(
    url: str, selector: Path, signals: Path, directory: Path, port: int, kills: int, jobs: int = 12, seed: int = 0
) -> dict[str, Any]:
    """A campaign on an empty database; figures, and under `wrong` what is."""
    upgrade_database(url)
    started = time.monotonic()
    config = ServeConfig(database=url, selector=selector, signals=signals, snapshot_every=100)
    service = PlainService(config, directory, port)
    try:
        told, policy = asyncio.run(_campaign(service, kills, jobs, seed))
    finally:
        service.kill()
    more = {"kills": kills, "seconds until ready": policy["seconds until ready"]}
    return figures(url, started, told, policy, **more)


def figures(
    url: str,
    started: float,
    told: Acknowledged,
    policy: Mapping[str, Any],
    wrong: Sequence[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """Of a campaign that is over. wrong: what is known to be wrong beside the log."""
    return {
        "database": url.partition(":")[0],
        **more,
        "seconds": round(time.monotonic() - started, 1),
        "decisions": len(told.decisions),
        **Counter(kind for kind, _, _ in told.events.values()),
        **told.counts,
        "wrong": [*wrong, *verify(url, told, policy)],
    }


def main_of(text: str | None, options: Mapping[str, tuple[int, str]], campaign: Campaign) -> None:
    """The command of a soak: its options, with defaults and help, then a campaign in a temporary directory."""
    from simmerge_ray.service.http.listening import free_port

    parser = script_parser(text)
    parser.add_argument("database", help="sqlite, postgresql, or the URL of an empty database")
    parser.add_argument("--run", type=Path, required=True, help="directory of a finished `simmerge demo`")
    for name, (default, meaning) in {**options, "seed": (0, "of the load and the kills")}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=meaning)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="simmerge-soak-") as directory,
        database_of(given.database, Path(directory)) as url,
    ):
        result = campaign(given, url, Path(directory), free_port())
    print(json.dumps(result, indent=2))
    sys.exit(1 if result["wrong"] else 0)


def _run(given: argparse.Namespace, url: str, directory: Path, port: int) -> dict[str, Any]:
    layout = RunLayout(given.run)
    return soak(url, layout.selector, layout.signals, directory, port, given.kills, given.jobs, given.seed)


if __name__ == "__main__":
    main_of(__doc__, {"kills": (500, "of the service"), "jobs": (12, "at once")}, _run)
