"""The load generator itself, against a server made for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from benchmarks.measuring import milliseconds
from benchmarks.service.load import Seen, Side, closed_loop, fsyncs, open_loop

Answer = Callable[[int, str], Awaitable[tuple[int, str] | None]]


async def served(answer: Answer, ask: Callable[[Side], Awaitable[Seen]]) -> tuple[Seen, list[str]]:
    """What the generator saw, and the paths that were asked for, of a server that answers with `answer(number, path)`;
    None closes the connection."""
    paths: list[str] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                length = next(int(line.partition(":")[2]) for line in head if line.lower().startswith("content-length"))
                await reader.readexactly(length)
                paths.append(head[0].split()[1])
                told = await answer(len(paths), paths[-1])
                if told is None:
                    break
                text = f"HTTP/1.1 {told[0]} X\r\ncontent-length: {len(told[1])}\r\n\r\n{told[1]}"
                writer.write(text[:10].encode())  # in two parts, as it may come
                await writer.drain()
                await asyncio.sleep(0)
                writer.write(text[10:].encode())
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    side = Side("127.0.0.1", server.sockets[0].getsockname()[1], "/x", [("a", "b")], seed=0)
    seen = await ask(side)
    side.close()
    server.close()
    return seen, paths


def test_an_open_loop_sends_on_whatever_became_of_earlier_requests():
    enough = asyncio.Event()

    async def answer(number: int, path: str) -> tuple[int, str]:
        if number >= 12:
            enough.set()
        if number == 1:
            await enough.wait()  # a closed loop of one client would wait for ever
        return 201, f'{{"decision_id":"d{number}"}}'

    seen, paths = asyncio.run(served(answer, lambda side: open_loop(side, 200, 0.2, seed=1)))
    decisions = [path for path in paths if path == "/x/v1/decisions"]
    assert not seen.errors and len(seen.latencies) == len(paths) == 2 * len(decisions) and len(decisions) > 8
    rewarded = sorted(path.split("/")[-2] for path in paths if path.endswith("/reward"))
    assert len(set(rewarded)) == len(decisions) and "d1" in rewarded


def test_refusals_and_closed_connections_are_errors_and_have_no_latency():
    async def answer(number: int, path: str) -> tuple[int, str] | None:
        return (503, "{}") if number % 2 else None

    async def ask(side: Side) -> Seen:
        return (await closed_loop(side, 1, 0.05))[1]

    seen, paths = asyncio.run(served(answer, ask))
    assert not seen.latencies and set(seen.errors) <= {"503", "ConnectionError"} and sum(seen.errors.values())
    assert sum(seen.errors.values()) == len(paths)
    assert not any(path.endswith("/reward") for path in paths)


def test_percentiles_are_in_milliseconds_and_fsyncs_are_written(tmp_path):
    assert milliseconds([0.001, 0.002, 0.003], [50]) == {"p50": 2.0} and milliseconds([], [50]) == {"p50": None}
    assert len(fsyncs(tmp_path / "file", 3)) == 3 and (tmp_path / "file").stat().st_size == 3 * 4096
