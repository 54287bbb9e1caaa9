"""The HTTP API, version 1: routes that translate between requests and a `Learner`, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from simmerge_ray.base.errors import InputError, StoreError
from simmerge_ray.service.http.access import Access
from simmerge_ray.service.http.dashboard import router as dashboard_router
from simmerge_ray.service.http.gate import SAID, Gate, Limits, Scope
from simmerge_ray.service.http.hot_path import DECIDE, KEY, REWARD, HotPath
from simmerge_ray.service.http.metrics import CONTENT_TYPE, Metrics
from simmerge_ray.service.learner import Learner
from simmerge_ray.service.schemas import (
    ArmRequest,
    CatalogueAnswer,
    CurveAnswer,
    Decision,
    DecisionList,
    DecisionRecord,
    DecisionRequest,
    DiscountRequest,
    EventSummary,
    PlansAnswer,
    PlansRequest,
    PolicyAnswer,
    Ranked,
    RankRequest,
    ReasonRequest,
    Refused,
    RewardAnswer,
    RewardRequest,
    SignalMatrix,
)

_log = logging.getLogger("simmerge.service")
VERSION = "1"
MAX_LISTED = 200
_ROLE = "x-role"
_OPEN: dict[str, Any] = {"security": []}  # in the document: no token is needed
_TEXT = {"description": "in Prometheus' format", "content": {"text/plain": {"schema": {"type": "string"}}}}
# FastAPI's own dependencies and header parameters took a fifth of the time of a decision: keys are looked at in
# the routes, roles by the gate, and the document is told of them.
_WITH_KEY: dict[str, Any] = {
    "parameters": [
        {
            "name": "Idempotency-Key",
            "in": "header",
            "required": False,
            "description": "a retry with the same key and body does nothing more, and has the same answer",
            "schema": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": r"^[\x21-\x7e]+$"},
        }
    ]
}
DecisionId = Annotated[str, Path(min_length=1, max_length=200, pattern=r"^[\w.\-]+$")]


class ErrorAnswer(BaseModel):
    """What went wrong, in one sentence."""

    detail: str


class Health(BaseModel):
    """The process answers."""

    status: str


class Ready(BaseModel):
    """The service can decide; seq: of the last event that it has folded."""

    status: str
    seq: int


_MEANINGS = {
    400: "the body cannot be parsed",
    401: "no token, or one that is not known",
    403: "the token's role does not allow this",
    404: "an unknown decision, checkpoint, task or signal",
    405: "another method is needed",
    408: "the body did not come in time",
    409: "the key, or what it is about, stands for something else",
    410: "the decision is closed or its time is over",
    413: "the request is too large",
    422: "a value does not fit",
    429: "too many requests; Retry-After says when",
    503: "the event log cannot be used now; Retry-After says when to try again",
}


def _errors(*more: int) -> dict[int | str, dict[str, Any]]:
    codes = sorted({400, 401, 403, 404, 405, 408, 413, 422, 429, 503, *more})
    return {code: {"model": ErrorAnswer, "description": _MEANINGS[code]} for code in codes}


def _needs(role: str) -> dict[str, Any]:
    """For the document, and for the gate, which looks at the role before a body is read."""
    return {_ROLE: role}


def _role_of(api: FastAPI) -> Callable[[Scope], str | None]:
    needed = [
        (route.path_regex, route.openapi_extra[_ROLE])
        for route in api.routes
        if isinstance(route, APIRoute) and route.openapi_extra and _ROLE in route.openapi_extra
    ]

    def role_of(scope: Scope) -> str | None:
        if scope["method"] != "POST":
            return None
        return next((role for path, role in needed if path.match(scope["path"])), None)

    return role_of


def _key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not KEY.fullmatch(key):
        raise Refused(422, "header.Idempotency-Key: it must have 1 to 200 printable characters of ASCII, and no space")
    return key


def create_app(
    make_learner: Callable[[], Learner], access: Access, metrics: Metrics, limits: Limits | None = None
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
    _add_changes(api, current)  # first, since they are asked for most
    _add_looks(api, current, metrics)
    api.include_router(dashboard_router(current, access.roles_of))
    gate = Gate(HotPath(api, current, _refusal), access, limits or Limits(), metrics, _role_of(api))
    gate.api = api  # type: ignore[attr-defined]
    return gate


def _describe(api: FastAPI) -> None:
    """Every route but the probes needs a token: the gate sees to it, so FastAPI cannot know."""
    written = api.openapi

    def openapi() -> dict[str, Any]:
        document = written()
        document["security"] = [{"token": []}]
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["token"] = {
            "type": "http",
            "scheme": "bearer",
            "description": "a token with a role, see docs/service.md",
        }
        return document

    api.openapi = openapi  # type: ignore[method-assign]


def _answer(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)


def _refusal(error: Exception) -> JSONResponse | None:
    """The answer for an error of the learner; None for one that nobody expected."""
    if isinstance(error, Refused):
        return _answer(error.status, error.detail)
    if isinstance(error, StoreError):
        _log.warning("refused for now: %s", error)
        return _answer(503, str(error), {"retry-after": "1"})
    if isinstance(error, InputError):
        return _answer(404 if str(error).startswith("unknown") else 422, str(error))
    return None


def _handle_errors(api: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> JSONResponse:
        answer = _refusal(error)
        assert answer is not None
        return answer

    for known in (Refused, StoreError, InputError):
        api.add_exception_handler(known, refused)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # Without the value, which may be long, secret, or no JSON.
        said = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()[:5]]
        return _answer(422, "; ".join(said))

    @api.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return _answer(error.status_code, str(error.detail), dict(error.headers or {}))


def _add_looks(api: FastAPI, current: Callable[[], Learner], metrics: Metrics) -> None:
    """Routes that change nothing."""

    @api.get("/healthz", operation_id="healthz", openapi_extra=_OPEN)
    async def healthz() -> Health:
        """The process answers. No token is needed."""
        return Health(status="ok")

    @api.get("/readyz", operation_id="readyz", responses={503: _errors()[503]}, openapi_extra=_OPEN)
    async def readyz() -> Ready:
        """The log can be read, and the selector that it names is there. No token is needed."""
        return Ready(status="ready", seq=await current().ready())

    @api.get("/metrics", operation_id="metrics", response_class=Response, responses={200: _TEXT, **_errors()})
    async def show_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @api.get("/v1/decisions", operation_id="list_decisions", responses=_errors())
    async def recent(
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 50,
        before: Annotated[int | None, Query(ge=1, le=2**62)] = None,
    ) -> DecisionList:
        """Decisions, newest first."""
        return await current().recent(limit, before)

    @api.get("/v1/decisions/{decision_id}", operation_id="get_decision", responses=_errors())
    async def get(decision_id: DecisionId) -> DecisionRecord:
        """A decision and what became of it."""
        return await current().get(decision_id)

    @api.get("/v1/policy", operation_id="get_policy", responses=_errors())
    async def policy() -> PolicyAnswer:
        """Posteriors of the arms, counts, and how well it goes."""
        return await current().policy()

    @api.get("/v1/rewards/curve", operation_id="reward_curve", responses=_errors())
    async def curve(points: Annotated[int, Query(ge=2, le=2000)] = 300) -> CurveAnswer:
        """Cumulative reward, and an estimate of what the best fixed arm would have had."""
        return await current().curve(points)

    @api.get("/v1/catalogue", operation_id="get_catalogue", responses=_errors())
    async def catalogue() -> CatalogueAnswer:
        """Checkpoints, tasks, arms and signals."""
        return await current().catalogue()

    @api.get("/v1/signals", operation_id="get_signals", responses=_errors())
    async def signals(
        signal: Annotated[str, Query(min_length=1, max_length=100)],
        task: Annotated[str | None, Query(max_length=200)] = None,
    ) -> SignalMatrix:
        """One signal of all pairs."""
        return await current().signals(signal, task or None)

    @api.post("/v1/rank", operation_id="rank_arms", responses=_errors(), openapi_extra=_needs("decide"))
    async def rank(body: RankRequest) -> Ranked:
        """All arms for a pair, without a decision."""
        return await current().rank(body)

    @api.post("/v1/plans", operation_id="rank_plans", responses=_errors(), openapi_extra=_needs("decide"))
    async def plans(body: PlansRequest) -> PlansAnswer:
        """The best plans over several checkpoints, without a decision."""
        return await current().plans(body)


def _add_changes(api: FastAPI, current: Callable[[], Learner]) -> None:
    """Routes that add to the log. 201: it is in the log since now; 200: it was there already."""

    def again(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
        return {200: {"model": model, "description": "a retry; the same answer as the first time"}, **_errors(409, 410)}

    @api.post(
        DECIDE,
        status_code=201,
        operation_id="decide",
        responses=again(Decision),
        openapi_extra=_needs("decide") | _WITH_KEY,
    )
    async def decide(body: DecisionRequest, request: Request, response: Response) -> Decision:
        """Which merge should be made? Give an Idempotency-Key to be able to ask again safely."""
        response.status_code, decision = await current().decide(body, _key(request))
        _say(request, decision.decision_id, arm=decision.arm)
        return decision

    @api.post(
        REWARD,
        status_code=201,
        operation_id="reward",
        responses=again(RewardAnswer),
        openapi_extra=_needs("reward") | _WITH_KEY,
    )
    async def reward(
        decision_id: DecisionId, body: RewardRequest, request: Request, response: Response
    ) -> RewardAnswer:
        """The measured utility, in [0, 1], of what was decided."""
        _say(request, decision_id, utility=body.utility)
        response.status_code, answer = await current().reward(decision_id, body, _key(request))
        return answer

    @api.post(
        "/v1/decisions/{decision_id}/void",
        status_code=201,
        operation_id="void_reward",
        responses=again(RewardAnswer),
        openapi_extra=_needs("admin") | _WITH_KEY,
    )
    async def void(decision_id: DecisionId, body: ReasonRequest, request: Request, response: Response) -> RewardAnswer:
        """The reward was wrong: it counts as if it had never been given. Another may follow."""
        _say(request, decision_id)
        response.status_code, answer = await current().void(decision_id, body, _key(request))
        return answer

    @api.post(
        "/v1/decisions/{decision_id}/close",
        status_code=201,
        operation_id="close_decision",
        responses=again(RewardAnswer),
        openapi_extra=_needs("reward") | _WITH_KEY,
    )
    async def close(decision_id: DecisionId, body: ReasonRequest, request: Request, response: Response) -> RewardAnswer:
        """No reward will come: the merge was infeasible (begin the reason with that word), or was not made."""
        _say(request, decision_id)
        response.status_code, answer = await current().close(decision_id, body, _key(request))
        return answer

    @api.post(
        "/v1/arms",
        status_code=201,
        operation_id="add_arm",
        responses=again(EventSummary),
        openapi_extra=_needs("admin") | _WITH_KEY,
    )
    async def add_arm(body: ArmRequest, request: Request, response: Response) -> EventSummary:
        """An operator that may be played from now on."""
        response.status_code, answer = await current().add_arm(body, _key(request))
        return answer

    @api.post(
        "/v1/discount",
        status_code=201,
        operation_id="discount",
        responses=again(EventSummary),
        openapi_extra=_needs("admin") | _WITH_KEY,
    )
    async def discount(body: DiscountRequest, request: Request, response: Response) -> EventSummary:
        """What was observed so far counts less: the world has changed."""
        response.status_code, answer = await current().discount(body, _key(request))
        return answer


def _say(request: Request, decision_id: str, **told: Any) -> None:
    """For the line of the log."""
    request.scope[SAID] = {"decision_id": decision_id, **told}
