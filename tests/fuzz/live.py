"""The real service on a port of its own, for requests that nobody should send."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from simmerge_ray.service.http.access import Access, Principal, token_digest
from simmerge_ray.service.http.api import create_app
from simmerge_ray.service.http.gate import Limits
from simmerge_ray.service.http.listening import free_port
from simmerge_ray.service.http.slow_clients import impatient
from simmerge_ray.service.learner import Learner
from simmerge_ray.service.log.database import upgrade_database
from simmerge_ray.service.metrics import PrometheusMetrics
from tests.unit.service.answering import write_answering

TOKENS = {role: f"a-token-of-{role}-for-tests" for role in ("decide", "reward", "admin")}
HEAD_SECONDS, BODY_SECONDS = 1.0, 1.0


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def refused(self, *statuses: int) -> bool:
        """With one of these, in the service's own words."""
        assert self.status in statuses, (self.status, self.body[:300])
        detail = self.json["detail"]
        return self.headers["content-type"] == "application/json" and isinstance(detail, str) and bool(detail)


@dataclass(frozen=True)
class LiveService:
    """port: on 127.0.0.1. document: of OpenAPI. checkpoints: known ids."""

    port: int
    document: dict[str, Any]
    checkpoints: tuple[str, ...]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send(
        self,
        method: str,
        path: str,
        body: bytes | Any = b"",
        token: str | None = TOKENS["admin"],
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """One request on a connection of its own; what is no bytes is sent as JSON."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, raw, {**sent, **(headers or {})})
            got = connection.getresponse()
            return Answer(got.status, {k.lower(): v for k, v in got.getheaders()}, got.read())
        finally:
            connection.close()

    def raw(self, data: bytes) -> bytes:
        """What is answered to these bytes until the service closes, or has been silent for long."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            answer = b""
            try:
                connection.sendall(data)
                while piece := connection.recv(65536):
                    answer += piece
            except ConnectionError:  # it closed while more was on its way
                pass
            return answer

    def decide(self, **changes: Any) -> str:
        """The id of a new decision."""
        left, right = self.checkpoints[:2]
        answer = self.send("POST", "/v1/decisions", {"left": left, "right": right, **changes})
        assert answer.status == 201, answer.body
        return str(answer.json["decision_id"])

    def works(self) -> None:
        """It still answers, and decides."""
        assert self.send("GET", "/readyz", token=None).status == 200
        self.decide()


@contextmanager
def live_service(root: Path) -> Iterator[LiveService]:
    """A service on made-up checkpoints, until the block ends."""
    files = write_answering(root)
    settings = files.settings(root)
    upgrade_database(settings.database)
    clients = [Principal(role, frozenset({role}), token_digest(token)) for role, token in TOKENS.items()]
    access = Access(clients, failures_per_s=1e6)  # each of the many wrong tokens shall be told that it is wrong
    app = create_app(lambda: Learner(settings), access, PrometheusMetrics(), Limits(body_seconds=BODY_SECONDS))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, http=impatient(HEAD_SECONDS), log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the service did not start"
            time.sleep(0.02)
        catalogue = LiveService(port, {}, ()).send("GET", "/v1/catalogue").json
        yield LiveService(port, app.api.openapi(), tuple(one["id"] for one in catalogue["checkpoints"]))
    finally:
        server.should_exit = True
        thread.join(30)
