"""The short way of the two frequent requests and FastAPI's way answer the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from simmerge_ray.service.http import api as http_api
from tests.unit.service.asking import PAIR, Service
from tests.unit.service.published import write_published

SHORT, LONG = "application/json", "application/json; charset=utf-8"  # only the first is plainly well-formed
REWARD = "/v1/decisions/{id}/reward"


@pytest.fixture(scope="module")
def routed() -> list[str]:
    """Paths that FastAPI was asked for."""
    return []


@pytest.fixture(scope="module")
def service(tmp_path_factory, routed) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        real = http_api.FastAPI.__call__

        async def noted(self: Any, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                routed.append(scope["path"])
            await real(self, scope, receive, send)

        patch.setattr(http_api.FastAPI, "__call__", noted)
        one = Service.on(write_published(tmp_path_factory.mktemp("files")), tmp_path_factory.mktemp("service"))
        yield one
        one.close()


def ask(service: Service, path: str, body: str | bytes, kind: str, key: str | None = None, role: str = "admin") -> Any:
    headers = {"content-type": kind} | ({} if key is None else {"idempotency-key": key})
    return service.ask("POST", path, role, content=body, headers=headers)


def test_each_way_answers_a_retry_of_the_other_with_the_same_bytes(service, routed):
    body = '{"left": "s1-c00", "right": "s1-c01", "explore": false}'
    for first, second in ((SHORT, LONG), (LONG, SHORT)):
        routed.clear()
        made = ask(service, "/v1/decisions", body, first, f"key of {first}".replace(" ", "-"))
        again = ask(service, "/v1/decisions", body, second, f"key of {first}".replace(" ", "-"))
        assert (made.status_code, again.status_code) == (201, 200)
        assert made.content == again.content and made.headers == again.headers
        path = REWARD.format(id=made.json()["decision_id"])
        given = ask(service, path, '{"utility": 0.25}', first)
        repeated = ask(service, path, '{"utility": 0.25}', second)
        assert (given.status_code, repeated.status_code) == (201, 200)
        assert (
            given.json() | {"status": "replayed"} == repeated.json() and given.headers.keys() == repeated.headers.keys()
        )
        assert routed == ["/v1/decisions", path], "one of two requests went the short way"


@pytest.mark.parametrize(
    ("path", "body", "key", "role"),
    [
        ("/v1/decisions", '{"left": "s1-c00", "right": "nobody"}', None, "admin"),
        ("/v1/decisions", '{"left": "s1-c00", "right": "s1-c00"}', None, "admin"),
        ("/v1/decisions", '{"left": "s1-c00"}', None, "admin"),
        ("/v1/decisions", '{"left": "s1-c00", "right": "s1-c01", "more": 1}', None, "admin"),
        ("/v1/decisions", '{"left": "s1-c00", "right": "s1-c01", "ttl_seconds": NaN}', None, "admin"),
        ("/v1/decisions", "{", None, "admin"),
        ("/v1/decisions", b"\xff\xfe", None, "admin"),
        ("/v1/decisions", "", None, "admin"),
        ("/v1/decisions", "[" * 5000, None, "admin"),
        ("/v1/decisions", '{"left": "s1-c00", "right": "s1-c01"}', "k" * 201, "admin"),
        ("/v1/decisions", '{"left": "s1-c00", "right": "s1-c01"}', None, "reward"),
        ("/v1/decisions?x=1", '{"left": "s1-c00"}', None, "admin"),
        (REWARD.format(id="absent"), '{"utility": 0.5}', None, "admin"),
        (REWARD.format(id="absent"), '{"utility": 1.5}', None, "admin"),
        (REWARD.format(id="absent"), '{"utility": Infinity}', None, "admin"),
        (REWARD.format(id="absent"), '{"utility": 0.5}', None, "decide"),
        (REWARD.format(id="a" * 201), '{"utility": 0.5}', None, "admin"),
        (REWARD.format(id="%20"), '{"utility": 0.5}', None, "admin"),
        (REWARD.format(id="%C3%A9"), '{"utility": 0.5}', None, "admin"),
    ],
)
def test_both_ways_refuse_alike(service, path, body, key, role):
    short, long = (ask(service, path, body, kind, key, role) for kind in (SHORT, LONG))
    assert short.status_code == long.status_code >= 400
    assert short.content == long.content


def test_a_key_for_something_else_is_a_conflict_on_both_ways(service):
    assert ask(service, "/v1/decisions", '{"left": "s1-c00", "right": "s1-c01"}', SHORT, "one-key").status_code == 201
    for kind in (SHORT, LONG):
        other = ask(service, "/v1/decisions", '{"left": "s1-c01", "right": "s1-c00"}', kind, "one-key")
        assert other.status_code == 409


def test_a_plan_is_decided_on_the_short_way_too(service, routed):
    routed.clear()
    body = {"checkpoints": [PAIR["left"], PAIR["right"]], "ways": 2}
    answer = service.ask("POST", "/v1/decisions", json=body)
    assert answer.status_code == 201 and answer.json()["kind"] == "plan" and not routed
