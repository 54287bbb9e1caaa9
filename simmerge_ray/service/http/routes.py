"""The routes of the API: they translate between requests and a `Learner`, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import BaseRoute

from simmerge_ray.service import schemas
from simmerge_ray.service.http.gate import SAID, Scope
from simmerge_ray.service.http.hot_path import DECIDE, KEY, REWARD, answered
from simmerge_ray.service.learner import Learner
from simmerge_ray.service.metrics import CONTENT_TYPE, PrometheusMetrics
from simmerge_ray.service.recipe_schemas import RankBody, RecipesRequest, RetentionRanking

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
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
    409: "the key, or what it is about, stands for something else; or the service has not what this needs",
    410: "the decision is closed or its time is over",
    413: "the request is too large",
    422: "a value does not fit",
    429: "too many requests; Retry-After says when",
    503: "the event log cannot be used now; Retry-After says when to try again",
}


def errors(*more: int) -> dict[int | str, dict[str, Any]]:
    """Answers of a route to what is wrong, for the document."""
    codes = sorted({400, 401, 403, 404, 405, 408, 413, 422, 429, 503, *more})
    return {code: {"model": ErrorAnswer, "description": _MEANINGS[code]} for code in codes}


def role_needed(routes: Iterable[BaseRoute]) -> Callable[[Scope], str | None]:
    """For the gate, which looks at the role before a body is read: the role that a request needs."""
    needed = [
        (route.path_regex, route.openapi_extra[_ROLE])
        for route in routes
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
        raise schemas.Refused(
            422, "header.Idempotency-Key: it must have 1 to 200 printable characters of ASCII, and no space"
        )
    return key


def probes(current: Callable[[], Learner], metrics: PrometheusMetrics) -> APIRouter:
    """Routes for what watches the service."""
    routes = APIRouter()

    @routes.get("/healthz", operation_id="healthz", openapi_extra=_OPEN)
    async def healthz() -> Health:
        """The process answers. No token is needed."""
        return Health(status="ok")

    @routes.get("/readyz", operation_id="readyz", responses={503: errors()[503]}, openapi_extra=_OPEN)
    async def readyz() -> Ready:
        """The log can be read, and the selector that it names is there. No token is needed."""
        return Ready(status="ready", seq=await current().ready())

    @routes.get("/metrics", operation_id="metrics", response_class=Response, responses={200: _TEXT, **errors()})
    async def show_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return routes


def looks(current: Callable[[], Learner]) -> APIRouter:
    """Routes that change nothing."""
    routes = APIRouter()

    @routes.get("/v1/decisions", operation_id="list_decisions", responses=errors())
    async def recent(
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 50,
        before: Annotated[int | None, Query(ge=1, le=2**62)] = None,
    ) -> schemas.DecisionList:
        """Decisions, newest first."""
        return await current().recent(limit, before)

    @routes.get("/v1/decisions/{decision_id}", operation_id="get_decision", responses=errors())
    async def get(decision_id: DecisionId) -> schemas.DecisionRecord:
        """A decision and what became of it."""
        return await current().get(decision_id)

    @routes.get("/v1/policy", operation_id="get_policy", responses=errors())
    async def policy() -> schemas.PolicyAnswer:
        """Posteriors of the arms, counts, and how well it goes."""
        return await current().policy()

    @routes.get("/v1/rewards/curve", operation_id="reward_curve", responses=errors())
    async def curve(points: Annotated[int, Query(ge=2, le=2000)] = 300) -> schemas.CurveAnswer:
        """Cumulative reward, and an estimate of what the best fixed arm would have had."""
        return await current().curve(points)

    @routes.get("/v1/catalogue", operation_id="get_catalogue", responses=errors())
    async def catalogue() -> schemas.CatalogueAnswer:
        """Checkpoints, tasks, arms and signals."""
        return await current().catalogue()

    @routes.get("/v1/signals", operation_id="get_signals", responses=errors())
    async def signals(
        signal: Annotated[str, Query(min_length=1, max_length=100)],
        task: Annotated[str | None, Query(max_length=200)] = None,
        part: Annotated[str, Query(max_length=200, description="of the ids of the checkpoints")] = "",
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    ) -> schemas.SignalMatrix:
        """One signal of all pairs of checkpoints, `limit` of them from `offset` on."""
        return await current().signals(signal, task or None, part, offset, limit)

    @routes.post(
        "/v1/rank",
        operation_id="rank",
        response_model=schemas.Ranked | RetentionRanking,
        responses=errors(409),
        openapi_extra={_ROLE: "decide"},
    )
    async def rank(body: RankBody) -> Response:
        """All arms for a pair, or recipes by what they keep of their members' answers; without a decision."""
        if isinstance(body, RecipesRequest):
            return answered(200, await current().score_recipes(body))  # up to 1000 rows: FastAPI would copy them twice
        return answered(200, await current().rank(body))

    @routes.post("/v1/plans", operation_id="rank_plans", responses=errors(409), openapi_extra={_ROLE: "decide"})
    async def plans(body: schemas.PlansRequest) -> schemas.PlansAnswer | RetentionRanking:
        """The best plans over several checkpoints, by the selector or by what they keep; without a decision."""
        if body.by == "retention":
            return await current().best_recipes(body)
        return await current().plans(body)

    return routes


def changes(current: Callable[[], Learner]) -> APIRouter:
    """Routes that add to the log. 201: it is in the log since now; 200: it was there already."""

    routes = APIRouter()

    def change(path: str, name: str, role: str, answer: type[BaseModel]) -> Callable[[Endpoint], Endpoint]:
        again = {200: {"model": answer, "description": "a retry; the same answer as the first time"}}
        responses = again | errors(409, 410)
        extra = {_ROLE: role, **_WITH_KEY}
        return routes.post(
            path, status_code=201, operation_id=name, response_model=answer, responses=responses, openapi_extra=extra
        )

    @change(DECIDE, "decide", "decide", schemas.Decision)
    async def decide(body: schemas.DecisionRequest, request: Request) -> Response:
        """Which merge should be made? Give an Idempotency-Key to be able to ask again safely."""
        status, decision = await current().decide(body, _key(request))
        _say(request, decision.decision_id, arm=decision.arm)
        return answered(status, decision)

    @change(REWARD, "reward", "reward", schemas.RewardAnswer)
    async def reward(decision_id: DecisionId, body: schemas.RewardRequest, request: Request) -> Response:
        """The measured utility, in [0, 1], of what was decided."""
        _say(request, decision_id, utility=body.utility)
        return answered(*await current().reward(decision_id, body, _key(request)))

    @change("/v1/decisions/{decision_id}/void", "void_reward", "admin", schemas.RewardAnswer)
    async def void(decision_id: DecisionId, body: schemas.ReasonRequest, request: Request) -> Response:
        """The reward was wrong: it counts as if it had never been given. Another may follow."""
        _say(request, decision_id)
        return answered(*await current().void(decision_id, body, _key(request)))

    @change("/v1/decisions/{decision_id}/close", "close_decision", "reward", schemas.RewardAnswer)
    async def close(decision_id: DecisionId, body: schemas.ReasonRequest, request: Request) -> Response:
        """No reward will come: the merge was infeasible (begin the reason with that word), or was not made."""
        _say(request, decision_id)
        return answered(*await current().close(decision_id, body, _key(request)))

    @change("/v1/arms", "add_arm", "admin", schemas.EventSummary)
    async def add_arm(body: schemas.ArmRequest, request: Request) -> Response:
        """An operator that may be played from now on."""
        return answered(*await current().add_arm(body, _key(request)))

    @change("/v1/discount", "discount", "admin", schemas.EventSummary)
    async def discount(body: schemas.DiscountRequest, request: Request) -> Response:
        """What was observed so far counts less: the world has changed."""
        return answered(*await current().discount(body, _key(request)))

    return routes


def _say(request: Request, decision_id: str, **told: Any) -> None:
    """For the line of the log."""
    request.scope[SAID] = {"decision_id": decision_id, **told}
