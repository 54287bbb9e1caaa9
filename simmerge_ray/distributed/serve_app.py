"""The recommender behind HTTP on Ray Serve: one deployment, no hop to another (a hop costs most of the throughput)."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from ray import serve

from simmerge_ray.config import ServeConfig
from simmerge_ray.distributed.resources import ray_session
from simmerge_ray.errors import InputError
from simmerge_ray.progress import Narrator
from simmerge_ray.service.recommender import Recommender
from simmerge_ray.service.schemas import CatalogueAnswer, Decision, DecisionRequest

APP_NAME = "simmerge"
api = FastAPI(title="simmerge_ray", version="1")


@api.exception_handler(InputError)
async def _refuse(request: Request, error: InputError) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=404 if str(error).startswith("unknown") else 422)


class AppArgs(BaseModel):
    """What `build` needs: absolute paths of the selector and of the signal table, readable on every node."""

    selector: str
    signals: str
    num_replicas: int = 1


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.5})
@serve.ingress(api)
class SelectorService:
    """One replica with its own copy of the recommender; it keeps no state."""

    def __init__(self, args: AppArgs) -> None:
        self._recommender = Recommender.load(Path(args.selector), Path(args.signals))

    @api.post("/v1/decisions", response_model=Decision)
    async def decide(self, request: DecisionRequest) -> Decision:
        """Which operator should merge two checkpoints."""
        return self._recommender.decide(request)

    @api.get("/v1/catalogue", response_model=CatalogueAnswer)
    async def catalogue(self) -> CatalogueAnswer:
        """Checkpoints, tasks and arms."""
        return self._recommender.catalogue()

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """The replica answers."""
        return {"status": "ok", "model_version": self._recommender.model_version}


def build(args: AppArgs) -> serve.Application:
    """Typed app builder, for `serve deploy` (`cluster/serve.yaml`) and `simmerge serve`."""
    return SelectorService.options(num_replicas=args.num_replicas).bind(args)  # type: ignore[attr-defined]


def run_service(config: ServeConfig, narrator: Narrator, until: threading.Event | None = None) -> None:
    """Start Ray Serve, print where it listens, and serve until Ctrl-C, SIGTERM or `until` is set; then clean up.

    Raises:
        SelectorError, ConfigError: an artifact that cannot be served, before Ray is started.
    """
    recommender = Recommender.load(config.selector, config.signals)
    stop = until or threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
    with ray_session():
        try:
            serve.start(http_options={"host": config.host, "port": config.port})
            serve.run(build(_app_args(config)), name=APP_NAME, route_prefix="/", blocking=False)
            left, right = recommender.example_pair()
            url = f"http://{config.host}:{config.port}"
            narrator.say(f"serving the selector at {url} (API at {url}/docs, Ctrl-C ends it); ask it:")
            narrator.say(curl_line(url, left, right))
            stop.wait()
        finally:
            serve.shutdown()


def _app_args(config: ServeConfig) -> AppArgs:
    return AppArgs(
        selector=str(config.selector.resolve()), signals=str(config.signals.resolve()), num_replicas=config.num_replicas
    )


def curl_line(url: str, left: str, right: str) -> str:
    """A request that works as printed."""
    body = f'{{"left": "{left}", "right": "{right}"}}'
    return f"curl -s -X POST {url}/v1/decisions -H 'content-type: application/json' -d '{body}'"
