"""The real service in a thread of the test's process, and what tests ask it for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from simmerge_ray.base.config import ServiceConfig
from simmerge_ray.service.http.listening import free_port


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve an ASGI app; its URL."""
    config = uvicorn.Config(app, port=free_port(), log_level="warning", ws="none", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{config.port}"
    finally:
        server.should_exit = True
        thread.join()


class Service:
    """A running service. tokens: by what they may do."""

    def __init__(self, url: str, tokens: dict[str, str], settings: ServiceConfig) -> None:
        self.url, self.tokens, self.settings = url, tokens, settings
        catalogue = self.ask("GET", "/v1/catalogue")
        self.checkpoints = [one["id"] for one in catalogue["checkpoints"]]
        self.tasks, self.signals = catalogue["tasks"], catalogue["signals"]
        first, second, third = self.checkpoints[:3]
        self.pairs = [(first, second), (second, third)]

    def ask(self, method: str, path: str, payload: dict[str, Any] | None = None) -> Any:
        """One request as somebody else makes it, beside the browser."""
        headers = {"Authorization": f"Bearer {self.tokens['admin']}"}
        answer = httpx.request(method, self.url + path, json=payload, headers=headers, timeout=60)
        assert answer.is_success, answer.text
        return answer.json()
