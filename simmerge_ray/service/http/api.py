"""The HTTP API, version 1, around one learner: routes, errors, the dashboard, and the gate before them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from simmerge_ray.base.errors import InputError, StoreError
from simmerge_ray.service.http.access import Access
from simmerge_ray.service.http.dashboard.pages import router as dashboard_router
from simmerge_ray.service.http.gate import Gate, Limits, refused
from simmerge_ray.service.http.hot_path import HotPath
from simmerge_ray.service.http.routes import changes, looks, probes, role_needed
from simmerge_ray.service.learner import Learner
from simmerge_ray.service.metrics import PrometheusMetrics
from simmerge_ray.service.recipe_schemas import FORMS
from simmerge_ray.service.schemas import Refused

_log = logging.getLogger("simmerge.service")
VERSION = "1"


def create_app(
    make_learner: Callable[[], Learner], access: Access, metrics: PrometheusMetrics, limits: Limits | None = None
) -> Any:
    """The application, with the dashboard; its lifespan starts and stops one learner.

    Returns:
        an ASGI application. Its `api` is the FastAPI inside, for the OpenAPI document.
    """
    held: list[Learner] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        learner = make_learner()
        learner.observer = metrics
        held[:] = [learner]
        await learner.start()
        try:
            yield
        finally:
            await learner.stop()

    api = FastAPI(title="simmerge_ray", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)

    def current() -> Learner:
        return held[0]

    _describe(api)
    _handle_errors(api)
    api.include_router(changes(current))  # first, since they are asked for most
    api.include_router(probes(current, metrics))
    api.include_router(looks(current))
    api.include_router(dashboard_router(current, access.roles_of))
    gate = Gate(HotPath(api, current, _refusal), access, limits or Limits(), metrics, role_needed(api.routes))
    gate.api = api  # type: ignore[attr-defined]
    return gate


def _describe(api: FastAPI) -> None:
    """Every route but the probes needs a token: the gate sees to it, so FastAPI cannot know."""
    written = api.openapi

    def openapi() -> dict[str, Any]:
        document = written()
        document["security"] = [{"token": []}]
        scheme = {"type": "http", "scheme": "bearer", "description": "a token with a role, see docs/service.md"}
        document.setdefault("components", {}).setdefault("securitySchemes", {})["token"] = scheme
        return document

    api.openapi = openapi  # type: ignore[method-assign]


def _refusal(error: Exception) -> JSONResponse | None:
    """The answer for an error of the learner; None for one that nobody expected."""
    if isinstance(error, Refused):
        return refused(error.status, error.detail)
    if isinstance(error, StoreError):
        _log.warning("refused for now: %s", error)
        return refused(503, str(error), wait=1)
    if isinstance(error, InputError):
        return refused(404 if str(error).startswith("unknown") else 422, str(error))
    return None


def _handle_errors(api: FastAPI) -> None:
    async def known_error(request: Request, error: Exception) -> JSONResponse:
        answer = _refusal(error)
        assert answer is not None
        return answer

    for known in (Refused, StoreError, InputError):
        api.add_exception_handler(known, known_error)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # Without the value, which may be long, secret, or no JSON.
        said = [
            f"{'.'.join(str(part) for part in one['loc'] if part not in FORMS)}: {one['msg']}"
            for one in error.errors()[:5]
        ]
        return refused(422, "; ".join(said))

    @api.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return refused(error.status_code, str(error.detail), error.headers)
