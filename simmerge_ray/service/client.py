"""HTTP client of the service: ask which merge to make, report what it was worth. No torch, no Ray.

    with Client("http://merges.example:8000", token) as client:
        decision = client.decide("code-7b", "math-7b")
        client.reward(decision.decision_id, utility)

Whatever can be lost on the way is sent again: connections that fail, 429, and 502 to 504, with growing pauses and the
pause that the service asks for. That is safe because every call that writes has an idempotency key, the same for all
its tries: the service answers a repeated one with the first answer. A caller that may itself be restarted between call
and answer gives a key of its own, e.g. the name of its job.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import tenacity
from pydantic import BaseModel, ValidationError

from simmerge_ray.base.errors import ClientError, RefusedError, UnavailableError
from simmerge_ray.service import schemas
from simmerge_ray.service.recipe_schemas import RetentionRanking
from simmerge_ray.service.schemas import check_utility

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE, TOKEN_VARIABLE = "SIMMERGE_URL", "SIMMERGE_TOKEN"
RETRIED = (429, 502, 503, 504)
_OF_INGRESS = (404, 500)  # as plain text: Ray Serve's words for "no replica at the moment"; the service speaks JSON
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 15.0
LONGEST_RETRY_AFTER_S = 120.0
_MAX_SHOWN = 300  # characters of an answer that is not ours

Answer = TypeVar("Answer", bound=BaseModel)


class Client:
    """One service. Threads may share it; `close_connections`, or a `with` block, ends it.

    Args:
        url: of the service; None takes the variable SIMMERGE_URL, or this machine's port 8000. token: None takes the
            variable SIMMERGE_TOKEN. timeout: seconds for one try. retries: tries after the first. transport, sleep:
            other ways to send and to wait, for tests.

    Every method raises RefusedError (the request does not fit: 4xx), UnavailableError (no answer in all tries, or 5xx),
    or ClientError (an answer that is not this API's).
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        timeout: float = 30.0,
        retries: int = 5,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = (url or os.environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/")
        token = token or os.environ.get(TOKEN_VARIABLE)
        if retries < 0:
            raise RefusedError(None, f"retries is {retries}; it must be 0 or more")
        if token and not (token.isascii() and token.isprintable()):
            raise RefusedError(None, "the token has characters that no header can hold")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, transport=transport)
            self._http.build_request("GET", "/")
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
            raise RefusedError(None, f"{self.url!r} is not the URL of a service: {error}") from None
        if self._http.base_url.scheme not in ("http", "https") or not self._http.base_url.host:
            raise RefusedError(None, f"{self.url!r} is not the URL of a service; e.g. {DEFAULT_URL}")
        self._retries, self._sleep = retries, sleep

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_connections()

    def close_connections(self) -> None:
        """Nothing is sent any more. (`close` closes a decision.)"""
        self._http.close()

    def decide(
        self,
        left: str,
        right: str,
        task: str | None = None,
        explore: bool = True,
        ttl_seconds: float | None = None,
        key: str | None = None,
    ) -> schemas.Decision:
        """Which arm should merge two checkpoints?

        Args:
            task: choose for this task alone; None: for both parents' tasks together. explore: False takes what is known
                to be best; the service learns less. ttl_seconds: how long a reward may take; None: as the service has
                it. key: idempotency key; None: a new one.
        """
        body = {"left": left, "right": right, "task": task, "explore": explore, "ttl_seconds": ttl_seconds}
        return self._send("POST", "/v1/decisions", schemas.Decision, body, _key(key))

    def decide_plan(
        self,
        checkpoints: Sequence[str],
        ways: str | int = "2-4",
        task: str | None = None,
        explore: bool = True,
        ttl_seconds: float | None = None,
        key: str | None = None,
    ) -> schemas.Decision:
        """Which plan should merge some of these checkpoints? ways: how many of them; the rest as in `decide`."""
        body = {"checkpoints": list(checkpoints), "task": task, "ways": ways, "explore": explore}
        return self._send("POST", "/v1/decisions", schemas.Decision, {**body, "ttl_seconds": ttl_seconds}, _key(key))

    def reward(self, decision_id: str, utility: float, key: str | None = None) -> schemas.RewardAnswer:
        """Report the measured utility, in [0, 1], of the merge that a decision chose."""
        try:
            check_utility(utility)
        except ValueError as error:
            raise RefusedError(422, str(error)) from None
        return self._send("POST", _path(decision_id, "/reward"), schemas.RewardAnswer, {"utility": utility}, _key(key))

    def void(self, decision_id: str, reason: str, key: str | None = None) -> schemas.RewardAnswer:
        """The reward of a decision was wrong: take it back. Another may follow."""
        return self._send("POST", _path(decision_id, "/void"), schemas.RewardAnswer, {"reason": reason}, _key(key))

    def close(self, decision_id: str, reason: str, key: str | None = None) -> schemas.RewardAnswer:
        """No reward will come: the merge was infeasible, or was not made."""
        return self._send("POST", _path(decision_id, "/close"), schemas.RewardAnswer, {"reason": reason}, _key(key))

    def get(self, decision_id: str) -> schemas.DecisionRecord:
        """A decision, and what became of it."""
        return self._send("GET", _path(decision_id), schemas.DecisionRecord)

    def decisions(self, limit: int = 50, before: int | None = None) -> schemas.DecisionList:
        """The newest decisions; before: the `next_before` of the last answer, for those that came before them."""
        query = {"limit": limit} | ({} if before is None else {"before": before})
        return self._send("GET", "/v1/decisions", schemas.DecisionList, query=query)

    def policy(self) -> schemas.PolicyAnswer:
        """What the service has learned so far."""
        return self._send("GET", "/v1/policy", schemas.PolicyAnswer)

    def catalogue(self) -> schemas.CatalogueAnswer:
        """Checkpoints, tasks and arms that may be named."""
        return self._send("GET", "/v1/catalogue", schemas.CatalogueAnswer)

    def plans(
        self, checkpoints: Sequence[str] | None = None, ways: str | int = "2-4", task: str | None = None, top: int = 10
    ) -> schemas.PlansAnswer:
        """Ranked plans; nothing is decided. checkpoints: None takes the whole catalogue."""
        names = None if checkpoints is None else list(checkpoints)
        body = {"checkpoints": names, "task": task, "ways": ways, "top": top}
        return self._send("POST", "/v1/plans", schemas.PlansAnswer, body)

    def best_recipes(
        self, checkpoints: Sequence[str] | None = None, ways: str | int = "2-4", task: str | None = None, top: int = 10
    ) -> RetentionRanking:
        """The best recipes by what they keep of their members' own answers; nothing is merged. Arguments as `plans`."""
        names = None if checkpoints is None else list(checkpoints)
        body = {"checkpoints": names, "task": task, "ways": ways, "top": top, "by": "retention"}
        return self._send("POST", "/v1/plans", RetentionRanking, body)

    def score_recipes(self, recipes: Sequence[Mapping[str, Any]], task: str | None = None) -> RetentionRanking:
        """What recipes keep of their members' own answers, the best first.

        Args:
            recipes: as `plans.recipe.Recipe.to_json` writes them, or `{"source": id}`; at most 1000.
        """
        body = {"recipes": [dict(one) for one in recipes], "task": task}
        return self._send("POST", "/v1/rank", RetentionRanking, body)

    def rank(self, left: str, right: str, task: str | None = None) -> schemas.Ranked:
        """Ranked arms for two checkpoints; nothing is decided."""
        return self._send("POST", "/v1/rank", schemas.Ranked, {"left": left, "right": right, "task": task})

    def add_arm(
        self, arm: str, sibling: str | None = None, power: float = 0.3, key: str | None = None
    ) -> schemas.EventSummary:
        """An operator that may be chosen from now on. sibling, power: it starts from what that arm has learned."""
        body = {"arm": arm, "sibling": sibling, "power": power}
        return self._send("POST", "/v1/arms", schemas.EventSummary, body, _key(key))

    def _send(
        self,
        method: str,
        path: str,
        answer: type[Answer],
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, Any] | None = None,
    ) -> Answer:
        """One call, with its retries; the same request each time."""
        try:
            request = self._http.build_request(method, path, json=body, headers=headers, params=query)
        except (ValueError, TypeError) as error:  # NaN, or a header that is none
            raise RefusedError(None, f"{method} {path} cannot be sent: {error}") from None

        def attempt() -> Answer:
            try:
                response = self._http.send(request)
            except (httpx.TransportError, OSError) as error:
                problem = f"no answer from {self.url}: {str(error) or type(error).__name__}"
                raise UnavailableError(None, problem, retry_after=0.0) from None
            if _may_pass(response):
                raise UnavailableError(response.status_code, _detail(response), _retry_after(response))
            return _read(response, answer)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_be_answered),
            wait=_pause,
            stop=tenacity.stop_after_attempt(self._retries + 1),
            sleep=self._sleep,
            reraise=True,
        )
        return retrying(attempt)


def _key(key: str | None) -> dict[str, str]:
    if key is not None and not (0 < len(key) <= 200 and key.isascii() and key.isprintable()):
        raise RefusedError(None, f"the key {key[:40]!r} must have 1 to 200 printable ASCII characters")
    return {"Idempotency-Key": key or uuid.uuid4().hex}


def _path(decision_id: str, rest: str = "") -> str:
    if decision_id in ("", ".", ".."):
        raise RefusedError(404, f"no decision {decision_id!r}")
    return f"/v1/decisions/{quote(decision_id, safe='')}{rest}"


def _may_be_answered(error: BaseException) -> bool:
    asked = error.retry_after if isinstance(error, UnavailableError) else None
    return asked is not None and asked <= LONGEST_RETRY_AFTER_S


def _pause(state: tenacity.RetryCallState) -> float:
    """Twice as long each time, and by chance up to half less, so that clients that failed together part; after what
    the service asks for."""
    longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (state.attempt_number - 1))
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, UnavailableError) else None
    return longest * random.uniform(0.5, 1.0) + (asked or 0.0)


def _may_pass(response: httpx.Response) -> bool:
    """Whether another try may be answered."""
    plain = response.headers.get("Content-Type", "").startswith("text/plain")
    return response.status_code in RETRIED or (plain and response.status_code in _OF_INGRESS)


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the service asks to wait, from a number or a date; 0 where it says nothing that can be read."""
    text = response.headers.get("Retry-After", "")
    try:
        seconds = float(text) if text.isdigit() else parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError):
        return 0.0
    return max(0.0, seconds)


def _read(response: httpx.Response, answer: type[Answer]) -> Answer:
    status = response.status_code
    if 400 <= status < 500:
        raise RefusedError(status, _detail(response))
    if status >= 500:
        raise UnavailableError(status, _detail(response))
    if status >= 300:
        raise ClientError(status, f"{response.url} points to {response.headers.get('Location')!r}; give that URL")
    try:
        return answer.model_validate_json(response.content)
    except ValidationError as error:
        what = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, what["loc"]))
        raise ClientError(
            status, f"{response.url} is not this version's API: {where or 'answer'}: {what['msg']}"
        ) from None


def _detail(response: httpx.Response) -> str:
    """What the service says; of an answer that is not ours, e.g. a proxy's page, its beginning."""
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        text = " ".join(response.text.split())
        return text[:_MAX_SHOWN] or f"{response.status_code} {response.reason_phrase}"
    return detail if isinstance(detail, str) else str(detail)[:_MAX_SHOWN]
