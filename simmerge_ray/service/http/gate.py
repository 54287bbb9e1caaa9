"""The gate in front of the routes: authentication, limits of size and rate, and headers for every answer. Plain ASGI.

Requests are refused here before they are parsed. The whole body must arrive within a time limit: a client that sends
a byte now and then would otherwise hold a task for ever.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response

from simmerge_ray.service.http.access import Access, Principal
from simmerge_ray.service.http.dashboard.session import same_origin, token_of
from simmerge_ray.service.metrics import PrometheusMetrics

_log = logging.getLogger("simmerge.service")
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# In the scope: who asks, the whole body, and what the line of the log says of the request.
CLIENT, BODY, SAID = "simmerge_client", "simmerge_body", "simmerge_said"
_RECIPES = "/v1/rank"
_OPEN = ("/healthz", "/readyz")
_OF_PAGE = ("/", "/login", "/logout")  # the dashboard answers these without a token by itself
_LOG_IN = ("/retention",)  # pages that ask for a token where they have none, and count as requests where they have
_SECURITY = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Limits:
    """body_bytes: of a request. recipes_bytes: of one that may hold many recipes. body_seconds: within which it must
    have come."""

    body_bytes: int = 64 * 1024
    recipes_bytes: int = 512 * 1024
    body_seconds: float = 10.0


class Gate:
    """Wraps the application. Its refusals are JSON, `{"detail": ...}`.

    role_of: the role that a request needs; None where any will do.
    """

    def __init__(
        self,
        app: App,
        access: Access,
        limits: Limits,
        metrics: PrometheusMetrics,
        role_of: Callable[[Scope], str | None] = lambda scope: None,
    ) -> None:
        self._app, self._access, self._limits, self._metrics = app, access, limits, metrics
        self._role_of = role_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, told = time.perf_counter(), {"status": 0}

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                told["status"] = message["status"]
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in _SECURITY.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            if (refusal := self._refusal(scope)) is not None:
                await refusal(scope, receive, counted)
                return
            body = await self._body(scope, receive)
            if isinstance(body, bytes):
                scope[BODY] = body
                await self._app(scope, _replayed(body, receive), counted)
            elif body is not None:
                await body(scope, receive, counted)
        finally:
            self._finish(scope, told["status"], time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> Response | None:
        """The refusal of a request, None if it may proceed; sets the client of the scope."""
        path = scope["path"]
        address = (scope.get("client") or ("",))[0]
        if path in _OPEN or path in _OF_PAGE or path.startswith("/static/"):
            logs_in = path == "/login" or (path == "/" and b"token=" in scope["query_string"])
            if logs_in and (wait := self._access.wait_to_log_in(address)):
                return refused(429, "too many tokens from this address", wait=wait)
            return None
        connection = HTTPConnection(scope)
        token = token_of(connection)
        client = self._access.client_of(token)
        if client is None:
            wait = self._access.wait_after_failure(address) if token else 0.0
            if wait:
                return refused(429, "too many wrong tokens from this address", wait=wait)
            if path in _LOG_IN:
                return None
            said = "a bearer token is needed" if token is None else "this token is not known"
            return refused(401, said, {"www-authenticate": "Bearer"})
        by_cookie = "authorization" not in connection.headers
        if by_cookie and scope["method"] not in ("GET", "HEAD") and not same_origin(connection.headers):
            return refused(403, "this request comes from a page of somebody else")
        if wait := self._access.wait(client):
            return refused(429, f"{client.name} asks more often than {client.per_second:g} times a second", wait=wait)
        scope[CLIENT] = client
        role = self._role_of(scope)
        if role is not None and not client.roles & {role, "admin"}:
            return refused(403, f"this needs a token with the role {role} or admin")
        return None

    async def _body(self, scope: Scope, receive: Receive) -> bytes | Response | None:
        """The whole body, a refusal, or None where the client has gone."""
        limit = self._limits.recipes_bytes if scope["path"] == _RECIPES else self._limits.body_bytes
        too_large = refused(413, f"the request has more than {limit} bytes", {"connection": "close"})
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > limit:
                return too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        return too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            return refused(408, "the body of the request did not come in time", {"connection": "close"})

    def _finish(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or ("refused" if status else "gone")
        self._metrics.requested(route, scope["method"], status, seconds)
        client: Principal | None = scope.get(CLIENT)
        if client is not None and scope["method"] != "GET":
            line = {
                "route": route,
                "method": scope["method"],
                "status": status,
                "milliseconds": round(1000 * seconds, 2),
                "client": client.name,
                **scope.get(SAID, {}),
            }
            _log.info(json.dumps(line))


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body that was read, once; then whatever comes (that the client has gone)."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return receive_again


def refused(status: int, detail: str, headers: Mapping[str, str] | None = None, wait: float = 0.0) -> JSONResponse:
    """An answer in the form of all that say what is wrong. wait: seconds after which to ask again."""
    again = {"retry-after": str(max(1, math.ceil(wait)))} if wait else {}
    return JSONResponse({"detail": detail}, status, {**(headers or {}), **again})
