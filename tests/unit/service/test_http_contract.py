"""What holds for every route of the API: roles, keys, errors, the document, metrics, log lines."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from simmerge_ray.base.errors import InputError, StoreError
from simmerge_ray.service.schemas import Refused
from tests.unit.service.asking import PAIR, TOKENS, Service
from tests.unit.service.published import PublishedFiles, write_published

# What each role may change; admin may everything.
ROUTES = [
    ("/v1/decisions", PAIR, {"decide"}),
    ("/v1/rank", PAIR, {"decide"}),
    ("/v1/plans", {"ways": 2, "top": 1}, {"decide"}),
    ("/v1/decisions/ID/reward", {"utility": 0.5}, {"reward"}),
    ("/v1/decisions/ID/close", {"reason": "not made"}, {"reward"}),
    ("/v1/decisions/ID/void", {"reason": "wrong"}, set()),
    ("/v1/arms", {"arm": "ties(density=0.2)"}, set()),
    ("/v1/discount", {"factor": 0.9, "reason": "a new evaluation"}, set()),
]
LOOKS = ["/v1/decisions", "/v1/decisions/ID", "/v1/policy", "/v1/rewards/curve", "/v1/catalogue"]
LOOKS += ["/v1/signals?signal=weight_cosine_global", "/metrics", "/openapi.json"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> PublishedFiles:
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def shared(files, tmp_path_factory) -> Iterator[Service]:
    """For what leaves no trace that another test would see."""
    one = Service.on(files, tmp_path_factory.mktemp("shared"))
    yield one
    one.close()


@pytest.fixture
def fresh(files, tmp_path) -> Iterator[Service]:
    one = Service.on(files, tmp_path)
    yield one
    one.close()


def one_sentence(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"detail"} and isinstance(body["detail"], str) and body["detail"]
    return str(body["detail"])


def num_events(service: Service) -> int:
    return int(service.ask("GET", "/v1/policy").json()["seq"])


@pytest.mark.parametrize(("path", "payload", "roles"), ROUTES, ids=[path for path, _, _ in ROUTES])
def test_a_role_may_do_its_own_and_nothing_else(fresh, path, payload, roles):
    for role in TOKENS:
        decision = fresh.decide()
        if "void" in path:
            fresh.ask("POST", f"/v1/decisions/{decision}/reward", json={"utility": 0.5})
        before = num_events(fresh)
        answer = fresh.ask("POST", path.replace("ID", decision), role, json=payload)
        if role in roles | {"admin"}:
            assert answer.is_success, answer.text
        else:
            assert "role" in one_sentence(answer, 403) and num_events(fresh) == before


@pytest.mark.parametrize("path", LOOKS)
def test_any_role_may_look(shared, path):
    path = path.replace("ID", shared.decide())
    assert [shared.ask("GET", path, role).status_code for role in TOKENS] == [200, 200, 200]
    one_sentence(shared.ask("GET", path, None), 401)


@pytest.mark.parametrize("key", ["", "x" * 201, "two words", "\xe4\xf6"])
def test_a_key_that_a_column_or_a_header_cannot_hold_is_refused(shared, key):
    before = num_events(shared)
    answer = shared.ask("POST", "/v1/decisions", json=PAIR, headers={"idempotency-key": key.encode("latin-1")})
    assert "Idempotency-Key" in one_sentence(answer, 422) and num_events(shared) == before


@pytest.mark.parametrize(
    ("path", "payload"),
    [
        ("/v1/decisions", PAIR),
        ("/v1/decisions", {"checkpoints": ["s1-c00", "s1-c01", "s1-c02"]}),
        ("/v1/decisions/ID/reward", {"utility": 0.5}),
        ("/v1/decisions/ID/close", {"reason": "not made"}),
        ("/v1/discount", {"factor": 0.9, "reason": "a new evaluation"}),
    ],
)
def test_a_retry_with_its_key_changes_nothing_and_has_the_same_answer(shared, path, payload):
    path = path.replace("ID", shared.decide())
    headers = {"idempotency-key": f"retry-{path}-{len(payload)}-{sorted(payload)[0]}"[:200]}
    first = shared.ask("POST", path, json=payload, headers=headers)
    assert first.status_code == 201
    events = num_events(shared)
    for _ in range(3):
        again = shared.ask("POST", path, json=payload, headers=headers)
        assert again.status_code == 200 and num_events(shared) == events
        assert {**again.json(), "status": None} == {**first.json(), "status": None}


def test_a_key_that_stands_for_something_else_is_a_conflict(shared):
    headers = {"idempotency-key": "one-key"}
    assert shared.ask("POST", "/v1/decisions", json=PAIR, headers=headers).status_code == 201
    events = num_events(shared)
    other, decision = PAIR | {"task": "t"}, shared.decide()
    one_sentence(shared.ask("POST", "/v1/decisions", json=other, headers=headers), 409)
    one_sentence(shared.ask("POST", f"/v1/decisions/{decision}/reward", json={"utility": 1}, headers=headers), 409)
    assert num_events(shared) == events + 1


@pytest.mark.parametrize(
    ("path", "payload", "status", "said"),
    [
        ("/v1/decisions/ID/close", {"reason": " "}, 422, "body.reason"),
        ("/v1/decisions/ID/close", {"reason": "x" * 1001}, 422, "body.reason"),
        ("/v1/decisions/nobody/close", {"reason": "x"}, 404, "nobody"),
        ("/v1/decisions/ID/void", {"reason": "there is no reward"}, 409, ""),
        ("/v1/arms", {"arm": "no such operator"}, 422, "no such operator"),
        ("/v1/arms", {"arm": "ties"}, 409, "exists already"),
        ("/v1/arms", {"arm": "slerp", "sibling": "nobody"}, 404, "nobody"),
        ("/v1/discount", {"factor": 0, "reason": "x"}, 422, "body.factor"),
        ("/v1/discount", {"factor": 1.5, "reason": "x"}, 422, "body.factor"),
        ("/v1/plans", {"checkpoints": ["s1-c00", "nobody"]}, 404, "unknown checkpoint 'nobody'"),
        ("/v1/plans", {"top": 0}, 422, "body.top"),
        ("/v1/rank", {"left": "s1-c00", "right": "s1-c01", "explore": True}, 422, "body.explore"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_logged(shared, path, payload, status, said):
    path = path.replace("ID", shared.decide())
    before = num_events(shared)
    assert said in one_sentence(shared.ask("POST", path, json=payload), status)
    assert num_events(shared) == before


def test_lists_go_on_where_they_ended(fresh):
    made = [fresh.decide() for _ in range(5)]
    seen: list[str] = []
    path = "/v1/decisions?limit=2"
    while path:
        page = fresh.ask("GET", path).json()
        assert len(page["decisions"]) <= 2
        seen += [one["decision_id"] for one in page["decisions"]]
        path = f"/v1/decisions?limit=2&before={page['next_before']}" if page["next_before"] else ""
    assert seen == made[::-1]
    for wrong in ("limit=0", "limit=201", "limit=x", "before=0", "before=1e9", f"before={2**70}"):
        one_sentence(fresh.ask("GET", f"/v1/decisions?{wrong}"), 422)


def test_arms_and_discounts_are_seen_in_the_policy(fresh):
    new = {"arm": "ties(density=0.2)", "sibling": "ties"}
    assert fresh.ask("POST", "/v1/arms", json=new).status_code == 201
    weights = {one["arm"]: one["weight"] for one in fresh.ask("GET", "/v1/policy").json()["arms"]}
    assert set(weights) == {"linear", "ties", "ties(density=0.2)"} and weights["ties"] > 0
    discount = {"factor": 0.5, "reason": "a new evaluation"}
    assert fresh.ask("POST", "/v1/discount", json=discount).status_code == 201
    after = {one["arm"]: one["weight"] for one in fresh.ask("GET", "/v1/policy").json()["arms"]}
    assert after == {arm: pytest.approx(weight / 2) for arm, weight in weights.items()}


def test_metrics_count_what_was_done_by_route_and_not_by_path(fresh):
    decisions = [fresh.decide() for _ in range(3)]
    for decision, utility in zip((*decisions[:2], decisions[0]), (0.5, 0.5, 0.6), strict=True):
        fresh.ask("POST", f"/v1/decisions/{decision}/reward", json={"utility": utility})
    fresh.ask("GET", "/v1/nowhere/at/all")
    answer = fresh.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert not any(decision in answer.text for decision in decisions) and "nowhere" not in answer.text
    lines = answer.text.splitlines()
    counts = [line for line in lines if line.startswith("simmerge_decisions_total")]
    assert sum(float(line.split()[-1]) for line in counts) == 3
    assert 'simmerge_rewards_total{outcome="created"} 2.0' in lines
    assert 'simmerge_rewards_total{outcome="conflict"} 1.0' in lines
    route = 'route="/v1/decisions/{decision_id}/reward",status="201"'
    assert f'simmerge_request_seconds_count{{method="POST",{route}}} 2.0' in lines


def test_the_log_has_one_json_line_for_each_decision_and_reward(fresh, caplog):
    with caplog.at_level(logging.INFO, "simmerge.service"):
        decision = fresh.decide()
        fresh.ask("POST", f"/v1/decisions/{decision}/reward", "reward", json={"utility": 0.25})
        fresh.ask("GET", "/v1/policy")
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.getMessage().startswith("{")]
    told = [(line["decision_id"], line["client"], line["status"]) for line in lines]
    assert told == [(decision, "admin", 201), (decision, "reward", 201)]
    assert lines[0]["arm"] in ("linear", "ties") and lines[1]["utility"] == 0.25
    assert not any(token in caplog.text for token in TOKENS.values())


class Broken:
    """A learner whose every answer is the same exception; it notes when it is started and stopped."""

    observer: Any = None

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.told: list[str] = []

    async def start(self) -> None:
        self.told.append("start")

    async def stop(self) -> None:
        self.told.append("stop")

    def __getattr__(self, name: str) -> Any:
        async def fails(*_: Any, **__: Any) -> None:
            raise self._error

        return fails


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StoreError("the disk is full"), 503),
        (InputError("unknown checkpoint 'x'"), 404),
        (InputError("the table was made by another version"), 422),
        (Refused(409, "somebody was first"), 409),
        (Refused(410, "too late"), 410),
    ],
)
def test_every_failure_is_answered_with_its_reason_on_every_route(error, status):
    broken = Broken(error)
    service = Service(lambda: broken)
    requests = [("GET", path, None) for path in ("/readyz", *LOOKS) if path.startswith(("/v1", "/readyz"))]
    requests += [("POST", path, payload) for path, payload, _ in ROUTES]
    for method, path, payload in requests:
        answer = service.ask(method, path.replace("ID", "x"), json=payload)
        assert one_sentence(answer, status) == str(error)
        assert (answer.headers.get("retry-after") == "1") == (status == 503)
    assert service.ask("GET", "/healthz", None).status_code == 200  # the process itself is well
    assert broken.told == ["start"]
    service.close()
    assert broken.told == ["start", "stop"]


def test_unknown_paths_and_methods_are_refused_in_one_sentence(shared):
    for path in ("/v1", "/v2/decisions", "/v1/decisions/a/b/c", "/docs", "/redoc"):
        one_sentence(shared.ask("GET", path), 404)
    for method in ("DELETE", "PUT", "PATCH"):
        answer = shared.ask(method, "/v1/decisions")
        one_sentence(answer, 405)
        assert answer.headers["allow"]


def test_the_document_names_every_route_and_what_each_answers(shared):
    document = shared.ask("GET", "/openapi.json").json()
    operations = [(path, method, one) for path, item in document["paths"].items() for method, one in item.items()]
    assert len({one["operationId"] for _, _, one in operations}) == len(operations) == 17
    assert "/" not in document["paths"] and "/login" not in document["paths"]
    for path, method, one in operations:
        assert one["description"]
        statuses = set(one["responses"])
        if path in ("/healthz", "/readyz"):
            assert one["security"] == []
        else:
            assert {"401", "405", "408", "413", "422", "429", "503"} <= statuses
            assert "security" not in one or one["security"]
        if method == "post":
            assert {"400", "403", "404"} <= statuses
            for kind in one["requestBody"]["content"].values():
                for form in kind["schema"].get("oneOf", [kind["schema"]]):
                    assert document["components"]["schemas"][form["$ref"].split("/")[-1]]["examples"]
        for status, answer in one["responses"].items():
            if int(status) >= 400:
                (kind, said), *others = answer["content"].items()
                assert kind == "application/json" and said["schema"]["$ref"].endswith("/ErrorAnswer") and not others
    assert document["security"] == [{"token": []}]
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"


def test_the_examples_of_the_document_are_requests_that_work(shared):
    """Names aside: those are of the demo."""
    schemas = shared.ask("GET", "/openapi.json").json()["components"]["schemas"]
    known = {"math-strong": "s1-c00", "rag-strong": "s1-c01", "code-strong": "s1-c02"}
    for name, path in (
        ("DecisionRequest", "/v1/decisions"),
        ("RankRequest", "/v1/rank"),
        ("PlansRequest", "/v1/plans"),
        ("RewardRequest", "/v1/decisions/ID/reward"),
        ("ReasonRequest", "/v1/decisions/ID/close"),
        ("ArmRequest", "/v1/arms"),
        ("DiscountRequest", "/v1/discount"),
    ):
        for example in schemas[name]["examples"]:
            text = json.dumps(example)
            for theirs, ours in known.items():
                text = text.replace(theirs, ours)
            payload = json.loads(text.replace('"task": "math"', '"task": "s"'))
            if payload.get("by") == "retention":
                continue  # it needs answers: see test_retention.py
            answer = shared.ask("POST", path.replace("ID", shared.decide()), json=payload)
            assert answer.status_code in (200, 201), (name, example, answer.text)
