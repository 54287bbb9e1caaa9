"""The API in the process of the test, over ASGI: no server, no socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from simmerge_ray.service.http.access import Access, Principal, token_digest
from simmerge_ray.service.http.api import create_app
from simmerge_ray.service.http.gate import Limits
from simmerge_ray.service.learner import Learner
from simmerge_ray.service.log.database import upgrade_database
from simmerge_ray.service.metrics import PrometheusMetrics
from tests.unit.service.answering import AnsweringFiles
from tests.unit.service.published import PublishedFiles

TOKENS = {role: f"token-of-{role}-0123456789" for role in ("decide", "reward", "admin")}
SLOW = "token-of-somebody-slow"
PAIR = {"left": "s1-c00", "right": "s1-c01"}


class Service:
    """Requests to an app that is started in a loop of its own. An exception that no handler takes fails the test."""

    def __init__(self, make_learner: Callable[[], Any]) -> None:
        clients = [Principal(role, frozenset({role}), token_digest(token)) for role, token in TOKENS.items()]
        clients.append(Principal("slow", frozenset({"decide"}), token_digest(SLOW), per_second=0.5))
        self.app = create_app(make_learner, Access(clients), PrometheusMetrics(), Limits(body_seconds=0.2))
        self.runner = asyncio.Runner()
        self._lifespan = self.app.api.router.lifespan_context(self.app.api)
        self.runner.run(self._lifespan.__aenter__())
        transport = httpx.ASGITransport(self.app)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://service")

    @classmethod
    def on(
        cls, files: PublishedFiles | AnsweringFiles, root: Path, upgraded: bool = True, **changes: object
    ) -> Service:
        """On a learner whose database lies in `root`."""
        settings = files.settings(root, **changes)  # type: ignore[arg-type]
        if upgraded:
            upgrade_database(settings.database)
        return cls(lambda: Learner(settings))

    def ask(self, method: str, path: str, role: str | None = "admin", **options: Any) -> httpx.Response:
        headers = dict(options.pop("headers", {}))
        if role is not None:
            headers["authorization"] = f"Bearer {TOKENS.get(role, role)}"
        return self.runner.run(self._client.request(method, path, headers=headers, **options))

    def decide(self, **changes: Any) -> str:
        """The id of a new decision."""
        answer = self.ask("POST", "/v1/decisions", json=PAIR | changes)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["decision_id"])

    def close(self) -> None:
        self.runner.run(self._client.aclose())
        self.runner.run(self._lifespan.__aexit__(None, None, None))
        self.runner.close()
