"""The API over ASGI on a real learner: statuses, roles, limits, headers. Fuzzing is in tests/fuzz."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from simmerge_ray.base.config import ServeConfig
from simmerge_ray.base.errors import ConfigError
from simmerge_ray.service.http.access import TOKEN_VARIABLE, TOKENS_VARIABLE
from simmerge_ray.service.http.gate import Gate
from simmerge_ray.service.http.standalone import completed, filesystem_of, prepare_database
from simmerge_ray.service.log.database import upgrade_database
from tests.unit.service.asking import PAIR, SLOW, TOKENS, Service
from tests.unit.service.live import TOKEN, running
from tests.unit.service.published import PublishedFiles, write_published


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> PublishedFiles:
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def service(files, tmp_path_factory) -> Iterator[Service]:
    one = Service.on(files, tmp_path_factory.mktemp("service"))
    yield one
    one.close()


def test_a_decision_its_reward_and_everything_that_shows_them(service):  # the first one: it counts
    answer = service.ask("POST", "/v1/decisions", "decide", json=PAIR, headers={"Idempotency-Key": "k"})
    assert answer.status_code == 201
    decision = answer.json()
    assert decision["arm"] in decision["propensities"] and decision["model_version"]
    again = service.ask("POST", "/v1/decisions", "decide", json=PAIR, headers={"Idempotency-Key": "k"})
    assert again.status_code == 200 and again.json() == decision
    other = service.ask(
        "POST", "/v1/decisions", "decide", json=PAIR | {"explore": False}, headers={"Idempotency-Key": "k"}
    )
    assert other.status_code == 409
    path = f"/v1/decisions/{decision['decision_id']}"
    assert service.ask("POST", f"{path}/reward", "reward", json={"utility": 0.5}).status_code == 201
    assert service.ask("POST", f"{path}/reward", "reward", json={"utility": 0.5}).status_code == 200
    assert service.ask("POST", f"{path}/reward", "reward", json={"utility": 0.6}).status_code == 409
    assert service.ask("POST", f"{path}/void", json={"reason": "wrong items"}).status_code == 201
    assert service.ask("POST", f"{path}/close", "reward", json={"reason": "not made"}).status_code == 201
    assert service.ask("POST", f"{path}/reward", "reward", json={"utility": 0.6}).status_code == 410
    assert service.ask("POST", "/v1/decisions/nobody/reward", "reward", json={"utility": 0.6}).status_code == 404
    assert service.ask("GET", path).json()["status"] == "closed"
    assert service.ask("GET", "/v1/decisions").json()["decisions"][0]["decision_id"] == decision["decision_id"]
    policy = service.ask("GET", "/v1/policy", "decide").json()
    assert policy["num_decisions"] == 1 and {arm["arm"] for arm in policy["arms"]} == {"linear", "ties"}
    metrics = service.ask("GET", "/metrics", "reward").text
    assert 'simmerge_rewards_total{outcome="created"} 1.0' in metrics
    assert 'simmerge_request_seconds_count{method="POST",route="/v1/decisions",status="201"} 1.0' in metrics


def test_every_other_route(service):
    assert service.ask("POST", "/v1/rank", json=PAIR).json()["arms"]
    plans = service.ask("POST", "/v1/plans", json={"checkpoints": ["s1-c00", "s1-c01", "s1-c02"], "ways": 3}).json()
    assert plans["exhaustive"] and plans["plans"][0]["label"]
    assert service.ask("GET", "/v1/catalogue").json()["example"]
    assert service.ask("GET", "/v1/rewards/curve").json()["seq"] == []
    matrix = service.ask("GET", "/v1/signals", params={"signal": "weight_cosine_global"}).json()
    ids, values = matrix["checkpoints"], matrix["values"]
    assert len(values) == len(ids) == matrix["num_matching"] and all(values[i][i] is None for i in range(len(ids)))
    asked = {"signal": "weight_cosine_global", "part": "-C0", "offset": 1, "limit": 2}
    part = service.ask("GET", "/v1/signals", params=asked).json()
    assert part["checkpoints"] == ids[1:3] and part["values"] == [row[1:3] for row in values[1:3]]
    none = service.ask("GET", "/v1/signals", params=asked | {"part": "nobody"}).json()
    assert none["checkpoints"] == none["values"] == [] and none["num_matching"] == 0
    assert service.ask("POST", "/v1/arms", json={"arm": "slerp", "sibling": "linear"}).status_code == 201
    assert service.ask("POST", "/v1/discount", json={"factor": 0.5, "reason": "new items"}).status_code == 201
    assert service.ask("GET", "/").status_code == 200


def test_without_a_token_nothing_but_health_is_told(service):
    for path in service.app.api.openapi()["paths"]:
        for role in (None, "wrong-token-0123456789"):
            status = service.ask("GET", path.replace("{decision_id}", "x"), role).status_code
            assert status in ((200,) if path in ("/healthz", "/readyz") else (401, 429)), path
    answer = service.ask("GET", "/v1/policy", None)
    assert answer.headers["www-authenticate"] == "Bearer" and answer.json()["detail"]
    assert service.ask("GET", "/openapi.json", None).status_code == 401


def test_a_role_does_what_it_is_for(service):
    assert service.ask("POST", "/v1/decisions", "reward", json=PAIR).status_code == 403
    assert service.ask("POST", "/v1/decisions/x/reward", "decide", json={"utility": 1}).status_code == 403
    assert service.ask("POST", "/v1/decisions/x/void", "reward", json={"reason": "x"}).status_code == 403
    assert service.ask("POST", "/v1/arms", "decide", json={"arm": "slerp"}).status_code == 403
    assert "role admin" in service.ask("POST", "/v1/discount", "reward", json={"factor": 1, "reason": "x"}).text


def test_a_cookie_is_good_for_pages_of_this_service_alone(service):
    cookie = {"cookie": f"simmerge_token={TOKENS['admin']}"}
    assert service.ask("GET", "/v1/policy", None, headers=cookie).status_code == 200
    assert service.ask("POST", "/v1/decisions", None, json=PAIR, headers=cookie).status_code == 201
    elsewhere = cookie | {"sec-fetch-site": "same-site"}
    assert service.ask("POST", "/v1/decisions", None, json=PAIR, headers=elsewhere).status_code == 403
    elsewhere = cookie | {"origin": "http://evil.example"}
    assert service.ask("POST", "/v1/decisions", None, json=PAIR, headers=elsewhere).status_code == 403


def test_who_asks_too_often_is_told_when_to_come_back(service):
    answers = [service.ask("GET", "/v1/catalogue", SLOW) for _ in range(3)]
    assert answers[0].status_code == 200 and answers[-1].status_code == 429
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert service.ask("GET", "/v1/catalogue", "decide").status_code == 200


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 422),
        (b"", 422),
        (b"\xff\xfe\xfa", 400),
        (b'{"left": "\xff", "right": "s1-c01"}', 400),
        (b"[" * 60_000, 400),
        (b'{"left": NaN, "right": "s1-c01"}', 422),
        (b'{"left": ' + b"9" * 5000 + b"}", 400),
        (b"x" * 70_000, 413),
        (json.dumps(PAIR | {"path": "/etc/passwd"}).encode(), 422),
        (json.dumps({"left": "s1-c00"}).encode(), 422),
        (json.dumps(PAIR | {"checkpoints": ["s1-c00", "s1-c01"]}).encode(), 422),
        (json.dumps({"left": "../../etc/passwd", "right": "s1-c01"}).encode(), 422),
        (json.dumps({"left": "s1-c00", "right": "nobody"}).encode(), 404),
        (json.dumps({"left": "s1-c00", "right": "s1-c00"}).encode(), 422),
        (json.dumps(PAIR | {"task": "nothing"}).encode(), 404),
        (json.dumps(PAIR | {"ttl_seconds": -1}).encode(), 422),
        (json.dumps({"checkpoints": ["s1-c00", "s1-c01"], "ways": "3-2"}).encode(), 422),
        (json.dumps({"checkpoints": ["s1-c00", "s1-c01"], "ways": "x"}).encode(), 422),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(service, content, status):
    before = service.ask("GET", "/v1/policy").json()["seq"]
    answer = service.ask("POST", "/v1/decisions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status and isinstance(answer.json()["detail"], str)
    assert service.ask("GET", "/v1/policy").json()["seq"] == before


@pytest.mark.parametrize("utility", ["NaN", "Infinity", "-0.1", "1.1", '"0.5"', "true", "null", "1e999"])
def test_a_reward_is_a_number_from_0_to_1(service, utility):
    decision = service.ask("POST", "/v1/decisions", json=PAIR).json()["decision_id"]
    content = f'{{"utility": {utility}}}'.encode()
    options = {"content": content, "headers": {"content-type": "application/json"}}
    assert service.ask("POST", f"/v1/decisions/{decision}/reward", **options).status_code == 422


def test_every_answer_has_the_headers_that_keep_browsers_safe(service):
    for path, role in (("/v1/policy", "admin"), ("/v1/policy", None), ("/nothing", "admin"), ("/", None)):
        headers = service.ask("GET", path, role).headers
        assert (
            headers["x-content-type-options"] == "nosniff"
            and "frame-ancestors 'none'" in headers["content-security-policy"]
        )


def test_a_body_that_does_not_come_is_given_up(service):
    async def slow() -> Any:
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(10)

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"authorization", f"Bearer {TOKENS['admin']}".encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/decisions", "headers": headers, "query_string": b""}
        await service.app(scope, receive, send)
        return sent[0]["status"]

    assert service.runner.run(slow()) == 408
    assert isinstance(service.app, Gate)


def test_a_database_that_is_away_is_503_until_it_is_back(files, tmp_path):
    service = Service.on(files, tmp_path, upgraded=False)
    try:
        answer = service.ask("POST", "/v1/decisions", json=PAIR)
        assert answer.status_code == 503 and answer.headers["retry-after"] and "simmerge db upgrade" in answer.text
        assert service.ask("GET", "/readyz", None).status_code == 503
        assert service.ask("GET", "/healthz", None).status_code == 200
        upgrade_database(f"sqlite:///{tmp_path}/service.db")
        assert service.ask("POST", "/v1/decisions", json=PAIR).status_code == 201
        assert service.ask("GET", "/readyz", None).json()["status"] == "ready"
    finally:
        service.close()


def test_a_network_filesystem_is_recognised(tmp_path, monkeypatch):
    mounts = "/dev/a / ext4 rw\nserver:/x /mnt/shared\\040dir nfs4 rw\n/dev/b /mnt/local xfs rw\n"
    assert filesystem_of(tmp_path / "x", mounts) == "ext4"
    from pathlib import Path

    assert filesystem_of(Path("/mnt/shared dir/run/service.db"), mounts) == "nfs4"
    assert filesystem_of(Path("/mnt/local/service.db"), mounts) == "xfs"
    monkeypatch.setattr("simmerge_ray.service.http.standalone.filesystem_of", lambda path, mounts: "nfs4")
    with pytest.raises(ConfigError, match="use PostgreSQL"):
        prepare_database(f"sqlite:///{tmp_path}/service.db")


def test_a_token_is_made_once_and_a_damaged_file_is_named(files, tmp_path, monkeypatch):
    for name in (TOKEN_VARIABLE, TOKENS_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    config = ServeConfig(signals=files.signals, registry=tmp_path / "selectors", database=f"sqlite:///{tmp_path}/x.db")
    service, token = completed(config)
    assert token and service.tokens == tmp_path / "tokens.yaml" and completed(config) == (service, token)
    assert (tmp_path / "tokens.yaml").stat().st_mode & 0o077 == 0
    (tmp_path / "tokens.yaml").write_text("[]")
    with pytest.raises(ConfigError, match=r"tokens\.yaml is damaged"):
        completed(config)
    with pytest.raises(ConfigError, match="name a run, or --signals, --database and --registry"):
        completed(ServeConfig(signals=files.signals))


def test_the_plain_process_serves_and_ends(files, tmp_path):
    with running(files, tmp_path) as live, live.client() as client:
        assert client.post("/v1/decisions", json=PAIR).status_code == 201
        assert httpx.get(f"{live.url}/v1/policy").status_code == 401
        host, port = live.url.removeprefix("http://").split(":")
        waiting = socket.create_connection((host, int(port)))  # it is not waited for: its body never comes
        head = "POST /v1/decisions HTTP/1.1", f"host: {host}", f"authorization: Bearer {TOKEN}", "content-length: 99"
        waiting.sendall("\r\n".join((*head, "", "")).encode())
    waiting.close()
    assert live.process.returncode == 0
    log = live.log.read_text()
    assert '"decision_id"' in log and "ending: requests that run have 2 s; nothing that was answered is lost" in log
    assert "Traceback" not in log
