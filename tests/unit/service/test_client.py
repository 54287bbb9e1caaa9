"""The HTTP client against answers that a test makes up: what it sends, when it tries again, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import httpx
import pytest

from simmerge_ray.base.errors import ClientError, InputError, RefusedError, UnavailableError
from simmerge_ray.service import client as module
from simmerge_ray.service.client import Client

DECISION: dict[str, Any] = {
    "decision_id": "d1",
    "kind": "pair",
    "left": "a",
    "right": "b",
    "tasks": ["code"],
    "arm": "ties",
    "explored": True,
    "reason": "drawn",
    "overrode": True,
    "propensities": {"linear": 0.25, "ties": 0.75},
    "arms": [{"arm": "ties", "utility": 0.5, "sd": 0.1, "propensity": 0.75}],
    "best_fixed": "linear",
    "epoch": 0,
    "seq_seen": 7,
    "model_version": "v",
}
REWARD = {"decision_id": "d1", "seq": 9, "at": 1.0, "status": "created", "utility": 0.5}

Answer = httpx.Response | Exception


class Service:
    """Gives the answers in turn, the last one for ever, and keeps what was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers, self.requests, self.pauses = list(answers), [], []

    def client(self, **options: Any) -> Client:
        transport = httpx.MockTransport(self._answer)
        return Client("http://service/", "secret", transport=transport, sleep=self.pauses.append, **options)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    @property
    def bodies(self) -> list[Any]:
        return [json.loads(request.content) for request in self.requests]

    @property
    def keys(self) -> list[str | None]:
        return [request.headers.get("Idempotency-Key") for request in self.requests]


def ok(body: Any, status: int = 200) -> httpx.Response:
    return httpx.Response(status, json=body)


def refusal(status: int, detail: Any = "no", **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"detail": detail}, headers={k.replace("_", "-"): v for k, v in headers.items()})


def test_a_decision_is_asked_for_with_the_token_and_a_new_key_each_time():
    service = Service(ok(DECISION, 201))
    with service.client() as client:
        decision = client.decide("a", "b", task="code", explore=False)
        client.decide("a", "b")
    assert decision.arm == "ties" and decision.propensities["linear"] == 0.25
    first, second = service.requests
    assert (first.method, str(first.url)) == ("POST", "http://service/v1/decisions")
    assert first.headers["Authorization"] == "Bearer secret" == second.headers["Authorization"]
    assert service.bodies[0] == {"left": "a", "right": "b", "task": "code", "explore": False, "ttl_seconds": None}
    assert all(service.keys) and service.keys[0] != service.keys[1]


CALLS: dict[str, tuple[Callable[[Client], Any], str, str, Any]] = {
    "decide_plan": (
        lambda c: c.decide_plan(("a", "b"), ways=3, ttl_seconds=60),
        "POST",
        "/v1/decisions",
        {"checkpoints": ["a", "b"], "task": None, "ways": 3, "explore": True, "ttl_seconds": 60},
    ),
    "reward": (lambda c: c.reward("d1", 0.5), "POST", "/v1/decisions/d1/reward", {"utility": 0.5}),
    "void": (lambda c: c.void("d1", "wrong"), "POST", "/v1/decisions/d1/void", {"reason": "wrong"}),
    "close": (lambda c: c.close("d1", "not made"), "POST", "/v1/decisions/d1/close", {"reason": "not made"}),
    "get": (lambda c: c.get("d1"), "GET", "/v1/decisions/d1", None),
    "decisions": (lambda c: c.decisions(), "GET", "/v1/decisions?limit=50", None),
    "decisions before": (lambda c: c.decisions(5, before=9), "GET", "/v1/decisions?limit=5&before=9", None),
    "policy": (lambda c: c.policy(), "GET", "/v1/policy", None),
    "catalogue": (lambda c: c.catalogue(), "GET", "/v1/catalogue", None),
    "plans": (
        lambda c: c.plans(top=3),
        "POST",
        "/v1/plans",
        {"checkpoints": None, "task": None, "ways": "2-4", "top": 3},
    ),
    "best_recipes": (
        lambda c: c.best_recipes(["a", "b"], ways=2),
        "POST",
        "/v1/plans",
        {"checkpoints": ["a", "b"], "task": None, "ways": 2, "top": 10, "by": "retention"},
    ),
    "score_recipes": (
        lambda c: c.score_recipes([{"source": "a"}], task="math"),
        "POST",
        "/v1/rank",
        {"recipes": [{"source": "a"}], "task": "math"},
    ),
    "rank": (lambda c: c.rank("a", "b"), "POST", "/v1/rank", {"left": "a", "right": "b", "task": None}),
    "add_arm": (
        lambda c: c.add_arm("slerp", "linear"),
        "POST",
        "/v1/arms",
        {"arm": "slerp", "sibling": "linear", "power": 0.3},
    ),
}
WRITES = {"decide_plan", "reward", "void", "close", "add_arm"}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_its_route_and_what_writes_has_a_key(name):
    call, method, path, body = CALLS[name]
    service = Service(refusal(404))
    with service.client() as client, pytest.raises(RefusedError):
        call(client)
    (request,) = service.requests
    assert (request.method, str(request.url)) == (method, f"http://service{path}")
    assert (json.loads(request.content) if request.content else None) == body
    assert (service.keys[0] is not None) == (name in WRITES)


@pytest.mark.parametrize(
    "trouble",
    [
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("cut off"),
        refusal(503, "the disk is full"),
        refusal(429),
        httpx.Response(502, text="<html>proxy</html>"),
        httpx.Response(504),
        httpx.Response(500, text="Internal Server Error"),  # HAProxy of Ray Serve, without a replica
        httpx.Response(404, text="Path '/v1/decisions' not found."),  # and just after it was started
    ],
    ids=lambda one: str(one) or type(one).__name__,
)
def test_what_may_pass_is_tried_again_with_the_same_key(trouble):
    service = Service(trouble, trouble, ok(REWARD, 201))
    with service.client() as client:
        assert client.reward("d1", 0.5).status == "created"
    assert len(service.requests) == 3 and len(set(service.keys)) == 1 and service.keys[0]
    assert len({request.content for request in service.requests}) == 1


def test_a_key_of_the_caller_is_what_is_sent():
    service = Service(ok(REWARD))
    with service.client() as client:
        client.reward("d1", 0.5, key="job-17")
        with pytest.raises(RefusedError, match="1 to 200 printable"):
            client.reward("d1", 0.5, key="job\n17")
        with pytest.raises(RefusedError, match="1 to 200 printable"):
            client.reward("d1", 0.5, key="")
    assert service.keys == ["job-17"]


def test_pauses_grow_and_are_bounded():
    service = Service(httpx.ConnectError("refused"))
    with service.client(retries=12) as client, pytest.raises(UnavailableError, match="no answer from http://service"):
        client.policy()
    assert len(service.requests) == 13 and len(service.pauses) == 12
    for number, pause in enumerate(service.pauses):
        longest = min(module.LONGEST_PAUSE_S, module.FIRST_PAUSE_S * 2**number)
        assert longest / 2 <= pause <= longest


def test_the_service_s_own_pause_is_kept():
    late = formatdate(module.time.time() + 30, usegmt=True)
    service = Service(refusal(429, Retry_After="7"), refusal(503, Retry_After=late), ok(REWARD))
    with service.client() as client:
        client.reward("d1", 0.5)
    assert 7 < service.pauses[0] < 7.3 and 28 < service.pauses[1] < 31


@pytest.mark.parametrize("said", ["soon", "", "-5", "Wed, 99 Foo 2026"])
def test_a_pause_that_cannot_be_read_is_none(said):
    service = Service(refusal(503, Retry_After=said), ok(REWARD))
    with service.client() as client:
        client.reward("d1", 0.5)
    assert service.pauses[0] <= module.FIRST_PAUSE_S


def test_nobody_waits_for_an_hour():
    service = Service(refusal(429, "too many", Retry_After="3600"))
    with service.client() as client, pytest.raises(UnavailableError, match=r"too many \(429\)"):
        client.policy()
    assert len(service.requests) == 1 and not service.pauses


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 413, 422])
def test_a_refusal_is_bad_input_and_not_tried_again(status):
    service = Service(refusal(status, "one clear sentence"))
    with service.client() as client, pytest.raises(InputError, match="one clear sentence") as caught:
        client.reward("d1", 0.5)
    assert isinstance(caught.value, RefusedError) and caught.value.status == status
    assert caught.value.detail == "one clear sentence" and len(service.requests) == 1


def test_an_error_of_the_service_is_not_bad_input():
    service = Service(httpx.Response(500, text="Internal Server Error"))
    with service.client() as client, pytest.raises(UnavailableError, match=r"Internal Server Error \(500\)") as caught:
        client.policy()
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (httpx.Response(200, text="<html>welcome</html>"), "not this version's API: answer"),
        (ok({**DECISION, "kind": "poem"}), "kind"),
        (ok([]), "not this version's API"),
        (httpx.Response(302, headers={"Location": "http://elsewhere/"}), "points to 'http://elsewhere/'"),
    ],
)
def test_an_answer_of_something_else_is_said_so(answer, said):
    service = Service(answer)
    with service.client() as client, pytest.raises(ClientError, match=said):
        client.decide("a", "b")
    assert len(service.requests) == 1  # a redirection is not followed: the token is for this service


@pytest.mark.parametrize("utility", [float("nan"), float("inf"), -0.1, 1.1, True])
def test_a_utility_that_is_none_is_not_sent(utility):
    service = Service(ok(REWARD))
    with service.client() as client, pytest.raises(RefusedError, match=r"must be a number in \[0, 1\]"):
        client.reward("d1", utility)
    assert not service.requests


@pytest.mark.parametrize("name", ["../policy", "a/b", "a?b=c", "a#b", "ä b", "%2e%2e", "a\nb"])
def test_an_id_never_changes_the_route(name):
    service = Service(refusal(404))
    with service.client() as client, pytest.raises(RefusedError):
        client.get(name)
    raw = service.requests[0].url.raw_path.decode()
    assert raw.startswith("/v1/decisions/") and raw.count("/") == 3 and "?" not in raw


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_an_id_that_is_none_is_not_sent(name):
    service = Service(ok(REWARD))
    with service.client() as client, pytest.raises(RefusedError, match="no decision"):
        client.reward(name, 0.5)
    assert not service.requests


def test_url_and_token_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("SIMMERGE_URL", "http://elsewhere:1/")
    monkeypatch.setenv("SIMMERGE_TOKEN", "from-env")
    service = Service(refusal(404))
    transport = httpx.MockTransport(service._answer)
    with Client(transport=transport) as client, pytest.raises(RefusedError):
        client.policy()
    assert str(service.requests[0].url) == "http://elsewhere:1/v1/policy"
    assert service.requests[0].headers["Authorization"] == "Bearer from-env"


@pytest.mark.parametrize(
    "options", [{"url": "ftp://x"}, {"url": "no url"}, {"url": "http://"}, {"token": "a\nb"}, {"retries": -1}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(RefusedError):
        Client(**{"url": "http://service", **options})


def test_the_client_needs_neither_torch_nor_ray():
    code = "import sys, simmerge_ray.service.client; print({'torch', 'ray', 'numpy', 'sqlalchemy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
