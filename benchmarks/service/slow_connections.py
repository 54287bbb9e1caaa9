"""Ten thousand connections that never finish their request: are others answered meanwhile?

    python -m benchmarks.service.slow_connections http://127.0.0.1:8000 --connections 10000 --seconds 60

Each connection sends the head of a POST and then one byte now and then (a "slow loris"); one that the service closes is
opened again. Beside it a prober asks `--path` on new connections and measures. As many connections as the limit of open
files allows are made (the soft limit is raised to the hard one) and as the ports of this machine allow. Prints JSON:
connections held, closed and refused, and the prober's answers and latencies before and during.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from benchmarks.measuring import milliseconds, script_parser

HEAD = "POST /v1/decisions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 50000\r\n"
RESERVED_FILES = 200  # for the prober and Python itself
BYTE_EVERY_S, PROBE_EVERY_S, PROBE_TIMEOUT_S = 5.0, 0.1, 30.0
OPENED_AT_ONCE = 200


def allowed(wanted: int) -> int:
    """How many connections the limit of open files allows, after it was raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < min(wanted + RESERVED_FILES, hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted + RESERVED_FILES, hard), hard))
    return max(1, min(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED_FILES))


class Slow:
    """The slow clients. counts: opened, closed (by the service), refused."""

    def __init__(self, host: str, port: int, in_body: bool, token: str | None) -> None:
        self._host, self._port, self._in_body = host, port, in_body
        self._authorization = _authorization(token)
        self.counts: Counter[str] = Counter()
        self.held = 0
        self._opening = asyncio.Semaphore(OPENED_AT_ONCE)

    async def hold(self, number: int, until: float) -> None:
        """One client: a connection, and another when it is closed, until a time."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep((number % 100) / 100 * BYTE_EVERY_S)
        while loop.time() < until:
            try:
                async with self._opening:
                    reader, writer = await asyncio.wait_for(asyncio.open_connection(self._host, self._port), 10)
            except (OSError, TimeoutError):
                self.counts["refused"] += 1
                await asyncio.sleep(1)
                continue
            self.counts["opened"] += 1
            self.held += 1
            try:
                await self._drip(reader, writer, until)
            except OSError:
                self.counts["closed"] += 1
            finally:
                self.held -= 1
                writer.transport.abort()

    async def _drip(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, until: float) -> None:
        """Half of the clients stop in the headers, half in the body; both go on with a byte now and then."""
        loop = asyncio.get_running_loop()
        head = HEAD.format(host=self._host) + self._authorization + ("\r\n{" if self._in_body else "X-Slow: ")
        writer.write(head.encode())
        while (left := until - loop.time()) > 0:
            await writer.drain()
            try:
                answer = await asyncio.wait_for(reader.read(4096), min(BYTE_EVERY_S, left))
            except TimeoutError:
                writer.write(b"a")
                continue
            if not answer:  # closed; an answer (408, 413, 503) is followed by that
                raise ConnectionResetError
            if answer.startswith(b"HTTP/"):  # the body may come in a piece of its own
                self.counts["answered " + answer[9:12].decode("ascii", "replace")] += 1


def _authorization(token: str | None) -> str:
    return f"Authorization: Bearer {token}\r\n" if token else ""


async def probe(url: Any, path: str, token: str | None, until: float) -> dict[str, Any]:
    """How many answers of what kind there were, each on a new connection, and how long those below 500 took."""
    loop = asyncio.get_running_loop()
    seconds: list[float] = []
    kinds: Counter[str] = Counter()
    head = f"GET {path} HTTP/1.1\r\nHost: {url.hostname}\r\n{_authorization(token)}Connection: close\r\n\r\n"
    request = head.encode()
    while loop.time() < until:
        started = loop.time()
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(url.hostname, url.port or 80)
                try:
                    writer.write(request)
                    answer = await reader.read()
                finally:
                    writer.transport.abort()
            kind = answer[9:12].decode("ascii", "replace") or "empty"
        except (OSError, TimeoutError) as error:
            kind = type(error).__name__
        kinds[kind] += 1
        if kind.isdigit() and kind < "500":
            seconds.append(loop.time() - started)
        await asyncio.sleep(max(0.0, PROBE_EVERY_S - (loop.time() - started)))
    times = {f"{name}_ms": value for name, value in milliseconds(seconds, (50, 99, 100)).items()}
    times["max_ms"] = times.pop("p100_ms")
    return {"probes": kinds.total(), "answers": dict(kinds)} | times


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    url = urlsplit(arguments.url)
    loop = asyncio.get_running_loop()
    count = allowed(arguments.connections)
    calm = await probe(url, arguments.path, arguments.token, loop.time() + arguments.calm)
    until = loop.time() + arguments.seconds
    clients = [Slow(url.hostname or "", url.port or 80, in_body, arguments.token) for in_body in (False, True)]
    tasks = [asyncio.create_task(clients[number % 2].hold(number, until)) for number in range(count)]
    most = 0

    async def watch() -> None:
        nonlocal most
        while loop.time() < until:
            most = max(most, sum(client.held for client in clients))
            await asyncio.sleep(0.5)

    started = time.monotonic()
    during, _ = await asyncio.gather(probe(url, arguments.path, arguments.token, until), watch())
    await asyncio.gather(*tasks)
    after = await probe(url, arguments.path, arguments.token, loop.time() + arguments.calm)
    return {
        "wanted": arguments.connections,
        "allowed": count,
        "most_held": most,
        "seconds": round(time.monotonic() - started, 1),
        "in_headers": dict(clients[0].counts),
        "in_body": dict(clients[1].counts),
        "before": calm,
        "during": during,
        "after": after,
    }


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("url", help="of a service, e.g. http://127.0.0.1:8000")
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--calm", type=float, default=5.0, help="seconds that are measured before and after")
    parser.add_argument("--path", default="/healthz", help="what the prober asks for")
    parser.add_argument("--token", help="without one, slow bodies are refused at their head")
    print(json.dumps(asyncio.run(run(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
