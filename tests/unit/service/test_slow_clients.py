"""Connections that never finish the head of a request are closed, others are served."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import uvicorn

from simmerge_ray.service.http.listening import free_port
from simmerge_ray.service.http.slow_clients import impatient

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def talk(port: int, *parts: bytes) -> bytes:
    """All that is answered to these parts until the service closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0.05)
    answer = await reader.read()
    writer.close()
    return answer


@pytest.fixture
def served():
    """Runs a coroutine function of the port beside a server."""

    def run(talks: Any) -> Any:
        async def both() -> Any:
            port = free_port()
            config = uvicorn.Config(app, port=port, http=impatient(0.3), lifespan="off", log_config=None)
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            try:
                return await asyncio.wait_for(talks(port), 60)
            finally:
                server.should_exit = True
                await serving

        return asyncio.run(both())

    return run


@pytest.mark.parametrize("parts", [(), (b"GET / HT",), (b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: a", b"b", b"c")])
def test_a_head_that_does_not_come_is_answered_with_408_and_closed(served, parts):
    head, body = served(lambda port: talk(port, *parts)).split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408") and f"content-length: {len(body)}".encode() in head
    assert json.loads(body)["detail"] == "the head of the request did not come"


def test_a_head_without_an_end_is_refused(served):
    endless = [b"GET / HTTP/1.1\r\n", *[b"X-Filler: " + b"x" * 20_000 + b"\r\n"] * 4]
    assert served(lambda port: talk(port, *endless)).startswith(b"HTTP/1.1 431")


def test_the_second_request_of_a_connection_has_its_own_time(served):
    answer = served(lambda port: talk(port, REQUEST, REQUEST[:10]))
    assert answer.startswith(b"HTTP/1.1 200") and b"ok" in answer and b"HTTP/1.1 408" in answer


def test_whole_requests_are_served_beside_slow_ones(served):
    async def talks(port: int) -> list[bytes]:
        closing = REQUEST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        slow = [talk(port, b"GET /") for _ in range(50)]
        return await asyncio.gather(*slow, talk(port, closing))

    *slow, whole = served(talks)
    assert whole.startswith(b"HTTP/1.1 200") and all(answer.startswith(b"HTTP/1.1 408") for answer in slow)
