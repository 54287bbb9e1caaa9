"""What is refused before any route sees it, by raw ASGI messages: no server, no learner."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from simmerge_ray.service.http.access import Access, Principal, token_digest
from simmerge_ray.service.http.dashboard.session import COOKIE
from simmerge_ray.service.http.gate import CLIENT, Gate, Limits

TOKEN, SLOW = "the-token-of-somebody", "the-token-of-a-slow-one"
BEARER = ("authorization", f"Bearer {TOKEN}")
FOR_EVER = "for ever"


class Seen:
    """An app that answers 200, and metrics that note what they are told."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []
        self.bodies: list[bytes] = []
        self.counted: list[tuple[str, str, int]] = []
        self.answer_headers: list[tuple[bytes, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] == "http":
            self.bodies.append((await receive())["body"])
            await send({"type": "http.response.start", "status": 200, "headers": list(self.answer_headers)})
            await send({"type": "http.response.body", "body": b"{}"})

    def decided(self, decision: Any) -> None: ...

    def rewarded(self, outcome: str) -> None: ...

    def state(self, view: Any, entropies: Any) -> None: ...

    def text(self) -> str:
        return ""

    def requested(self, route: str, method: str, status: int, seconds: float) -> None:
        assert seconds >= 0
        self.counted.append((route, method, status))


class Answer:
    """What was sent; status 0: nothing."""

    def __init__(self, sent: list[dict[str, Any]]) -> None:
        self.status = sent[0]["status"] if sent else 0
        self.headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]} if sent else {}
        self.body = b"".join(one.get("body", b"") for one in sent[1:])

    @property
    def detail(self) -> str:
        assert self.headers["content-type"] == "application/json"
        assert int(self.headers["content-length"]) == len(self.body)
        return str(json.loads(self.body)["detail"])


def ask(
    seen: Seen,
    *headers: tuple[str, str],
    method: str = "GET",
    path: str = "/v1/policy",
    messages: tuple[Any, ...] = ({"type": "http.request", "body": b""},),
    limits: Limits | None = None,
    access: Access | None = None,
    address: str = "192.0.2.1",
    times: int = 1,
    query: bytes = b"",
) -> Answer:
    """The answer to the last of `times` equal requests."""
    clients = [
        Principal("somebody", frozenset({"admin"}), token_digest(TOKEN)),
        Principal("slow", frozenset({"decide"}), token_digest(SLOW), 1.0),
    ]
    gate = Gate(seen, access or Access(clients, lambda: 0.0), limits or Limits(), seen)
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
        "client": (address, 1234),
    }

    async def main() -> Answer:
        sent: list[dict[str, Any]] = []
        for _ in range(times):
            left = list(messages)
            sent.clear()

            async def receive() -> Any:
                message = left.pop(0) if left else FOR_EVER  # noqa: B023
                if message == FOR_EVER:
                    await asyncio.Event().wait()
                return message

            async def send(message: Any) -> None:
                sent.append(message)

            await gate(dict(scope), receive, send)
        return Answer(sent)

    return asyncio.run(main())


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer "),),
        (("authorization", f"Basic {TOKEN}"),),
        (("authorization", TOKEN),),
        (("authorization", f"Bearer {TOKEN}x"),),
        (("authorization", f"Bearer {TOKEN[:-1]}"),),
        (("authorization", "Bearer \xff\xfe"),),
        (("cookie", f"{COOKIE}=wrong"),),
        (("cookie", f"other={TOKEN}"),),
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/policy", "/metrics", "/openapi.json", "/nothing", "/healthz/", "//healthz", "/v1/decisions/x/reward"]
)
def test_without_a_known_token_nothing_is_reached(headers, path):
    seen = Seen()
    for method in ("GET", "POST", "OPTIONS"):
        answer = ask(seen, *headers, path=path, method=method)
        assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer" and answer.detail
    assert seen.scopes == [] and {status for _, _, status in seen.counted} == {401}


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/", "/login", "/logout", "/static/page.js"])
def test_probes_and_what_the_dashboard_guards_itself_need_no_token(path):
    seen = Seen()
    assert ask(seen, path=path).status == 200
    assert CLIENT not in seen.scopes[0]


@pytest.mark.parametrize(
    "header", [BEARER, ("authorization", f"bearer   {TOKEN} "), ("cookie", f"a=b; {COOKIE}={TOKEN}")]
)
def test_a_token_comes_by_header_or_by_cookie(header):
    seen = Seen()
    assert ask(seen, header).status == 200
    assert seen.scopes[0][CLIENT].name == "somebody"


def test_a_wrong_header_is_not_made_good_by_a_cookie():
    seen = Seen()
    answer = ask(seen, ("authorization", "Bearer wrong"), ("cookie", f"{COOKIE}={TOKEN}"))
    assert answer.status == 401 and not seen.scopes


@pytest.mark.parametrize(
    ("headers", "method", "status"),
    [
        ((("sec-fetch-site", "same-origin"),), "POST", 200),
        ((("sec-fetch-site", "cross-site"),), "POST", 403),
        ((("sec-fetch-site", "same-site"),), "POST", 403),
        ((("sec-fetch-site", "cross-site"),), "DELETE", 403),
        ((("sec-fetch-site", "cross-site"),), "GET", 200),
        ((("origin", "http://evil.example"), ("host", "here")), "POST", 403),
        ((("origin", "http://here"), ("host", "here")), "POST", 200),
        ((), "POST", 200),
    ],
)
def test_a_cookie_changes_nothing_from_a_page_of_somebody_else(headers, method, status):
    cookie = ("cookie", f"{COOKIE}={TOKEN}")
    assert ask(Seen(), cookie, *headers, method=method).status == status
    assert ask(Seen(), BEARER, *headers, method=method).status == 200  # no page of another can send that header


def test_who_asks_too_often_is_told_when_to_come_back():
    seen = Seen()
    answer = ask(seen, ("authorization", f"Bearer {SLOW}"), times=3)
    assert answer.status == 429 and int(answer.headers["retry-after"]) >= 1 and "slow" in answer.detail
    assert len(seen.scopes) == 2


def test_many_wrong_tokens_of_one_address_are_refused_but_its_right_ones_are_not():
    seen = Seen()
    access = Access([Principal("somebody", frozenset({"admin"}), token_digest(TOKEN))], lambda: 0.0)
    wrong = ("authorization", "Bearer wrong")
    assert ask(seen, wrong, access=access, times=100).status == 429
    assert ask(seen, wrong, access=access, address="192.0.2.2").status == 401
    assert ask(seen, BEARER, access=access).status == 200  # colleagues may share the address


def test_a_request_without_any_token_is_no_guess():
    assert ask(Seen(), times=100).status == 401


def test_a_body_comes_whole_and_once_whatever_its_pieces():
    seen = Seen()
    pieces = (part(b"ab", True), part(b"", True), part(b"c", True), part(b"d"))
    assert ask(seen, BEARER, messages=pieces).status == 200
    assert seen.bodies == [b"abcd"]


@pytest.mark.parametrize("size", [9, 10])
def test_a_body_up_to_the_limit_passes(size):
    assert ask(Seen(), BEARER, messages=(part(b"x" * size),), limits=Limits(body_bytes=10)).status == 200


@pytest.mark.parametrize(
    ("headers", "messages"),
    [
        ((("content-length", "11"),), (FOR_EVER,)),  # refused by its head
        ((), (part(b"x" * 11),)),
        ((), (part(b"x" * 6, True), part(b"x" * 5, True), FOR_EVER)),  # no end was told
        ((("content-length", "3"),), (part(b"x" * 11),)),  # told a lie
        ((("content-length", "9" * 30),), (FOR_EVER,)),
    ],
)
def test_a_longer_body_is_refused_before_all_of_it_is_read(headers, messages):
    seen = Seen()
    answer = ask(seen, BEARER, *headers, messages=messages, limits=Limits(body_bytes=10))
    assert answer.status == 413 and "10 bytes" in answer.detail and answer.headers["connection"] == "close"
    assert not seen.scopes


@pytest.mark.parametrize("messages", [(FOR_EVER,), (part(b"{", True), FOR_EVER)])
def test_a_body_that_does_not_come_is_not_waited_for(messages):
    seen = Seen()
    answer = ask(seen, BEARER, messages=messages, limits=Limits(body_seconds=0.05))
    assert answer.status == 408 and answer.headers["connection"] == "close" and answer.detail
    assert not seen.scopes and seen.counted == [("refused", "GET", 408)]


def test_who_goes_away_gets_no_answer_and_makes_no_noise(caplog):
    seen = Seen()
    with caplog.at_level(logging.DEBUG):
        answer = ask(seen, BEARER, messages=(part(b"{", True), {"type": "http.disconnect"}), method="POST")
    assert answer.status == 0 and not seen.scopes and seen.counted == [("gone", "POST", 0)]
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_every_answer_has_headers_for_browsers_and_the_app_s_own_stay():
    names = ("content-security-policy", "x-content-type-options", "referrer-policy", "cache-control")
    seen = Seen()
    for answer in (ask(seen), ask(seen, BEARER), ask(seen, path="/healthz")):
        assert all(answer.headers[name] for name in names)
    assert "default-src 'none'" in ask(seen, BEARER).headers["content-security-policy"]
    seen.answer_headers = [(b"content-security-policy", b"default-src 'self'")]
    assert ask(seen, BEARER).headers["content-security-policy"] == "default-src 'self'"


def test_one_json_line_is_logged_for_a_change_without_the_token(caplog):
    seen = Seen()
    with caplog.at_level(logging.INFO, "simmerge.service"):
        ask(seen, BEARER, method="POST", path="/v1/decisions")
        ask(seen, BEARER, method="GET")
        ask(seen, ("authorization", "Bearer wrong"), method="POST")
    (record,) = caplog.records
    line = json.loads(record.getMessage())
    assert (line["client"], line["method"], line["status"]) == ("somebody", "POST", 200)
    assert line["milliseconds"] >= 0 and TOKEN not in caplog.text


def test_what_is_no_request_goes_through():
    seen = Seen()
    gate = Gate(seen, Access([Principal("a", frozenset({"admin"}), token_digest(TOKEN))]), Limits(), seen)
    asyncio.run(gate({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen.scopes == [{"type": "lifespan"}] and seen.counted == []


@pytest.mark.parametrize(("method", "path", "query"), [("POST", "/login", b""), ("GET", "/", b"a=b&token=guess")])
def test_tokens_are_not_tried_at_the_dashboard_as_often_as_one_likes(method, path, query):
    seen = Seen()
    access = Access([Principal("somebody", frozenset({"admin"}), token_digest(TOKEN))], lambda: 0.0)
    answer = ask(seen, method=method, path=path, query=query, access=access, times=100)
    assert answer.status == 429 and answer.headers["retry-after"] and len(seen.scopes) < 20
    assert ask(seen, path="/", access=access).status == 200  # who is in stays in
    assert ask(seen, method=method, path=path, query=query, access=access, address="192.0.2.2").status == 200


def test_a_failure_of_the_app_is_counted():
    seen = Seen()

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        raise RuntimeError("a bug")

    gate = Gate(fails, Access([Principal("a", frozenset({"admin"}), token_digest(TOKEN))]), Limits(), seen)
    scope = {"type": "http", "method": "GET", "path": "/healthz", "query_string": b"", "headers": []}

    async def receive() -> Any:
        return part(b"")

    async def send(message: Any) -> None: ...

    with pytest.raises(RuntimeError, match="a bug"):
        asyncio.run(gate(scope, receive, send))
    assert [status for _, _, status in seen.counted] == [500]
