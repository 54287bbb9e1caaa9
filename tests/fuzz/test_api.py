"""Schemathesis over the OpenAPI document of the real service: no 5xx, and no answer that the document does not have.

`SIMMERGE_FUZZ_EXAMPLES=2000 pytest tests/fuzz` is a campaign; the examples of the suite are few and always the same.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from tests.fuzz.live import TOKENS, LiveService

EXAMPLES = int(os.environ.get("SIMMERGE_FUZZ_EXAMPLES", "8"))
OPERATIONS = [
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/v1/decisions"),
    ("POST", "/v1/decisions"),
    ("GET", "/v1/decisions/{decision_id}"),
    ("POST", "/v1/decisions/{decision_id}/reward"),
    ("POST", "/v1/decisions/{decision_id}/void"),
    ("POST", "/v1/decisions/{decision_id}/close"),
    ("GET", "/v1/policy"),
    ("GET", "/v1/rewards/curve"),
    ("GET", "/v1/catalogue"),
    ("GET", "/v1/signals"),
    ("POST", "/v1/rank"),
    ("POST", "/v1/plans"),
    ("POST", "/v1/arms"),
    ("POST", "/v1/discount"),
]
# What a schema cannot say: two different checkpoints, one of two forms, as many as `ways`, operators that exist.
SEMANTIC = {"/v1/decisions", "/v1/rank", "/v1/plans", "/v1/arms"}
OPERATORS = ("task_arithmetic", "linear", "ties", "slerp", "regmean", "no such operator")
ARMS = ("linear", "ties", "slerp", "ties(density=0.2)", "dare_ties", "no such arm", "linear(")


load_all_checks()


@pytest.fixture(scope="module")
def schema(service: LiveService) -> Any:
    loaded = schemathesis.openapi.from_dict(service.document)
    loaded.config.update(base_url=service.url)
    loaded.config.generation.update(with_security_parameters=False)  # every call brings its token
    return loaded


def test_the_document_has_these_operations(service):
    found = {(method.upper(), path) for path, item in service.document["paths"].items() for method in item}
    assert found == set(OPERATIONS)


def with_known_names(case: Any, service: LiveService, number: int) -> Any:
    """Three of four cases with ids that the service knows, so that more than a 404 is reached."""
    if number % 4 == 3:
        return case
    ids = service.checkpoints
    body = case.body
    if isinstance(body, dict):
        if isinstance(body.get("left"), str) and isinstance(body.get("right"), str):
            body["left"], body["right"] = ids[number % len(ids)], ids[(number // 2 + 1) % len(ids)]
        if isinstance(body.get("checkpoints"), list):
            body["checkpoints"] = [ids[index % len(ids)] for index, _ in enumerate(body["checkpoints"])]
        for recipe in body["recipes"] if isinstance(body.get("recipes"), list) else ():
            for place, one in enumerate((recipe, *recipe.get("members", ()), *recipe.get("steps", ()))):
                for name in {"source", "checkpoint", "left", "right"} & set(one):
                    one[name] = ids[(place + (name == "right")) % len(ids)]
                if "operator" in one:
                    one["operator"] = OPERATORS[number % len(OPERATORS)]
                    one["parameters"] = one.get("parameters", {}) if number % 2 else {}
        if isinstance(body.get("arm"), str):
            body["arm"] = ARMS[number % len(ARMS)] if number % 2 else f"ties(density={number / 10_000})"
        for name, known in (("task", ("s", "t")), ("sibling", ("linear", "ties"))):
            if isinstance(body.get(name), str):
                body[name] = known[number % len(known)]
    if case.path_parameters and "decision_id" in case.path_parameters:
        case.path_parameters["decision_id"] = decision = service.decide()
        if case.operation.path.endswith("/void"):
            service.send("POST", f"/v1/decisions/{decision}/reward", {"utility": 0.5})
    if case.query and "signal" in case.query:
        case.query["signal"] = "weight_cosine_global"
        case.query.pop("task", None)
    return case


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fits", "does not fit"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=[f"{method} {path}" for method, path in OPERATIONS])
def test_every_answer_is_one_of_the_document(service, schema, method, path, mode):
    operation = schema[path][method]
    if mode == GenerationMode.NEGATIVE and not (operation.body or operation.query or operation.path_parameters):
        return  # nothing of it can be wrong
    calls = 0
    statuses = set()
    excluded = [CHECKS.get_one("positive_data_acceptance")] if path in SEMANTIC else []

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        nonlocal calls
        calls += 1
        if mode == GenerationMode.POSITIVE:
            case = with_known_names(case, service, calls)
        answer = case.call(headers={"Authorization": f"Bearer {TOKENS['admin']}"})
        assert answer.status_code < 500, (answer.status_code, answer.content[:300])
        statuses.add(answer.status_code // 100)
        case.validate_response(answer, excluded_checks=excluded)

    run()
    assert (2 if mode == GenerationMode.POSITIVE else 4) in statuses  # it came through, or was refused


def test_it_works_after_all_that(service):
    service.works()
