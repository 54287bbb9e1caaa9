"""The two requests that a service is asked most, without a framework around them: a decision for a pair, and a reward.

Routing, dependencies and middleware cost FastAPI more than such a request costs otherwise. A request goes this way if
it is plainly well-formed; every other one, and all that is refused for its form, goes on to FastAPI, which has the same
routes and says what is wrong. So there is one set of rules, and one document.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from simmerge_ray.service.http.gate import BODY, SAID, App, Receive, Scope, Send
from simmerge_ray.service.learner import Learner
from simmerge_ray.service.schemas import DecisionRequest, RewardRequest

DECIDE, REWARD = "/v1/decisions", "/v1/decisions/{decision_id}/reward"
_REWARD = re.compile(r"/v1/decisions/([\w.\-]{1,200})/reward", re.ASCII)
KEY = re.compile(r"[\x21-\x7e]{1,200}")  # that HTTP can carry, and no longer than its column
Request = TypeVar("Request", bound=BaseModel)
Answer = Callable[[], Awaitable[tuple[int, BaseModel]]]


_ROUTES = {path: SimpleNamespace(path=path) for path in (DECIDE, REWARD)}  # for the gate's metrics and log


def answered(status: int, model: BaseModel) -> Response:
    """What a request that changes something is answered."""
    return Response(model.model_dump_json(), status, media_type="application/json")


class HotPath:
    """In front of the FastAPI application, behind the gate.

    refusal: the answer for an error that is not of a request's form; None where it is not known.
    """

    def __init__(
        self, api: App, current: Callable[[], Learner], refusal: Callable[[Exception], Response | None]
    ) -> None:
        self._api, self._current, self._refusal = api, current, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._understood(scope) if scope["type"] == "http" and scope["method"] == "POST" else None
        if answer is None:
            await self._api(scope, receive, send)
            return
        try:
            response = answered(*await answer())
        except Exception as error:
            refusal = self._refusal(error)
            if refusal is None:
                raise
            response = refusal
        await response(scope, receive, send)

    def _understood(self, scope: Scope) -> Answer | None:
        """The call that a request stands for, if it is one of the two and well-formed."""
        path, learner = scope["path"], self._current()
        rewarded = None if path == DECIDE else _REWARD.fullmatch(path)
        if (path != DECIDE and rewarded is None) or scope.get("root_path") or scope["query_string"]:
            return None
        key, kind = None, b""
        for name, value in scope["headers"]:
            if name == b"idempotency-key":
                if key is not None:
                    return None
                key = value.decode("latin-1")
            elif name == b"content-type":
                kind = value
        if kind != b"application/json" or (key is not None and not KEY.fullmatch(key)):
            return None
        if rewarded is None:
            asked = _parsed(DecisionRequest, scope[BODY])
            return None if asked is None else lambda: self._decide(scope, learner, asked, key)
        given = _parsed(RewardRequest, scope[BODY])
        return None if given is None else lambda: self._reward(scope, learner, rewarded[1], given, key)

    async def _decide(
        self, scope: Scope, learner: Learner, asked: DecisionRequest, key: str | None
    ) -> tuple[int, BaseModel]:
        scope["route"] = _ROUTES[DECIDE]
        status, decision = await learner.decide(asked, key)
        scope[SAID] = {"decision_id": decision.decision_id, "arm": decision.arm}
        return status, decision

    async def _reward(
        self, scope: Scope, learner: Learner, decision_id: str, given: RewardRequest, key: str | None
    ) -> tuple[int, BaseModel]:
        scope["route"] = _ROUTES[REWARD]
        scope[SAID] = {"decision_id": decision_id, "utility": given.utility}
        return await learner.reward(decision_id, given, key)


def _parsed(model: type[Request], body: bytes) -> Request | None:
    try:
        return model.model_validate_json(body)
    except ValidationError:
        return None
