"""A uvicorn protocol with limits for the head of a request: when it has to be there, and how large it may be.

uvicorn itself has neither, so a client that sends a byte now and then holds a connection, and its file, for good, and
one that sends headers without an end fills the memory. (The body has its limits where it is read, in the application.
Behind HAProxy neither matters: it has its own.)
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_SECONDS, HEAD_BYTES = 10.0, 64 * 1024


def impatient(seconds: float = HEAD_SECONDS, num_bytes: int = HEAD_BYTES) -> type[asyncio.Protocol]:
    """For uvicorn's option `http`: a class that gives each request so many seconds and bytes for its line and headers.

    Bytes are counted by pieces as they come from the socket: a head that ends within a piece may be that much larger.
    """

    class Impatient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        _waiting: asyncio.TimerHandle | None = None
        _size = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            # A cycle begins when the head is whole; after its answer the next bytes are of another head.
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
                self._size = 0
                return
            self._size += len(data)
            if self._size > num_bytes:
                self._refuse(431, "Request Header Fields Too Large", f"the head has more than {num_bytes} bytes")
            elif self._waiting is None:
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _wait(self) -> None:
            self._waiting = self.loop.call_later(seconds, self._give_up)

        def _stop_waiting(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

        def _give_up(self) -> None:
            self._waiting = None
            self._refuse(408, "Request Timeout", "the head of the request did not come")

        def _refuse(self, status: int, phrase: str, detail: str) -> None:
            if not self.transport.is_closing():
                body = json.dumps({"detail": detail}).encode()
                head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
                self.transport.write(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
                self.transport.close()

    return Impatient
