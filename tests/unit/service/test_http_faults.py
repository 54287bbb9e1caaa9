"""What a client of the service sees while the disk, the database or the clock fails, and afterwards.

503 with the reason and when to try again; whatever was acknowledged is there in the end, and nothing else; nobody has
to restart anything.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, event, text

from simmerge_ray.service import follower as follower_module
from simmerge_ray.service.learner import Learner
from simmerge_ray.service.log.database import make_engine, open_database, upgrade_database
from tests.unit.service.asking import PAIR, Service
from tests.unit.service.published import PublishedFiles, write_published


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> PublishedFiles:
    return write_published(tmp_path_factory.mktemp("published"))


used: dict[Engine, set[sqlite3.Connection]] = {}  # connections of the services


@pytest.fixture
def engines(monkeypatch) -> list[Engine]:
    """Of the services of a test, as they open them."""
    found: list[Engine] = []

    def remembered(url: str) -> Engine:
        engine = open_database(url)
        event.listen(engine, "checkout", lambda one, *_: used.setdefault(engine, set()).add(one))
        found.append(engine)
        return engine

    monkeypatch.setattr(follower_module, "open_database", remembered)
    return found


@pytest.fixture
def start(files, tmp_path) -> Iterator[Callable[..., Service]]:
    """Services on a database, in the process of the test."""
    started: list[Service] = []

    def make(url: str, clock: Callable[[], float] = time.time, **settings: Any) -> Service:
        place = tmp_path / f"replica{len(started)}"
        started.append(Service(lambda: Learner(files.settings(place, database=url, **settings), clock)))
        return started[-1]

    yield make
    for service in started:
        service.close()


def sqlite_at(place: Path) -> str:
    url = f"sqlite:///{place}/service.db"
    upgrade_database(url)
    return url


def set_up_again(engine: Engine, pragma: str) -> None:
    """A setting of SQLite for every connection, those of now and those to come."""
    for one in list(used[engine]):  # threads of the service add to it
        with suppress(sqlite3.ProgrammingError):  # it is closed
            one.execute(pragma).close()
    event.listen(engine, "connect", lambda one, _: one.execute(pragma).close())


def refused_for_now(answer: httpx.Response, reason: str) -> None:
    assert answer.status_code == 503, answer.text
    assert reason in answer.json()["detail"] and answer.headers["retry-after"]


def listed(service: Service) -> set[str]:
    return {one["decision_id"] for one in service.ask("GET", "/v1/decisions?limit=200").json()["decisions"]}


def rewarded(service: Service, decision_id: str, utility: float = 0.5) -> httpx.Response:
    return service.ask("POST", f"/v1/decisions/{decision_id}/reward", json={"utility": utility})


@pytest.mark.parametrize(
    ("fails", "works", "reason"),
    [
        pytest.param("PRAGMA max_page_count=1", "PRAGMA max_page_count=100000", "full", id="full disk"),
        pytest.param("PRAGMA query_only=ON", "PRAGMA query_only=OFF", "readonly", id="read-only disk"),
    ],
)
def test_a_disk_that_takes_no_more(start, engines, tmp_path, fails, works, reason):
    service = start(sqlite_at(tmp_path))
    first = service.decide()
    acknowledged, refused = {first}, 0
    set_up_again(engines[0], fails)  # a full disk may still have room in the last page for some
    for _ in range(40):
        answer = service.ask("POST", "/v1/decisions", json=PAIR, headers={"idempotency-key": f"try-{refused}"})
        if answer.status_code == 201:
            acknowledged.add(answer.json()["decision_id"])
        else:
            refused_for_now(answer, reason)
            refused += 1
    assert refused > 10
    if reason == "readonly":
        refused_for_now(rewarded(service, first), reason)
    assert listed(service) == acknowledged  # what only looks is answered
    assert service.ask("GET", "/readyz", None).status_code == 200
    set_up_again(engines[0], works)
    again = service.ask("POST", "/v1/decisions", json=PAIR, headers={"idempotency-key": "try-0"})
    assert again.status_code in (200, 201)
    acknowledged.add(again.json()["decision_id"])
    assert rewarded(service, first).status_code == 201
    assert listed(service) == acknowledged


def test_a_server_that_goes_away_and_comes_back(start, postgres_server):
    admin = make_engine(f"{postgres_server}/postgres").execution_options(isolation_level="AUTOCOMMIT")

    def tell(*statements: str) -> None:
        with admin.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))

    throw_out = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'leaving'"
    tell("DROP DATABASE IF EXISTS leaving", "CREATE DATABASE leaving")
    upgrade_database(f"{postgres_server}/leaving")
    service = start(f"{postgres_server}/leaving")
    first = service.decide()
    tell("ALTER DATABASE leaving ALLOW_CONNECTIONS false", throw_out)
    for answer in (
        service.ask("POST", "/v1/decisions", json=PAIR),
        rewarded(service, first),
        service.ask("GET", "/v1/policy"),
        service.ask("GET", f"/v1/decisions/{first}"),
        service.ask("GET", "/readyz", None),
    ):
        refused_for_now(answer, "not currently accepting connections")
    assert service.ask("GET", "/healthz", None).status_code == 200
    tell("ALTER DATABASE leaving ALLOW_CONNECTIONS true")
    assert service.ask("GET", "/readyz", None).status_code == 200
    assert rewarded(service, first).status_code == 201
    second = service.decide()
    assert listed(service) == {first, second}
    tell(throw_out)  # all connections are gone at once: the next request takes new ones
    assert rewarded(service, service.decide()).status_code == 201
    admin.dispose()


def test_a_clock_that_jumps(start, tmp_path):
    now = [1_800_000_000.0]
    service = start(sqlite_at(tmp_path), clock=lambda: now[0], ttl_seconds=3600.0)
    kept, late = service.decide(), service.decide()
    assert rewarded(service, kept).status_code == 201
    now[0] -= 86400.0  # back by a day: the order is the log's, not the clock's
    early = service.decide()
    assert rewarded(service, early).status_code == 201
    assert [one["decision_id"] for one in service.ask("GET", "/v1/decisions").json()["decisions"]] == [
        early,
        late,
        kept,
    ]
    now[0] += 3 * 86400.0  # and on: what was open is over, what was acknowledged stands
    assert rewarded(service, late).status_code == 410
    assert rewarded(service, kept).status_code == 200
    assert service.ask("GET", f"/v1/decisions/{late}").json()["status"] == "expired"
    now[0] -= 3 * 86400.0  # it was the clock that was wrong, and nobody closed it meanwhile
    assert rewarded(service, late).status_code == 201
    assert service.ask("GET", "/v1/policy").json()["num_rewards"] == 3


def test_two_clusters_on_one_database(start, database):
    one, two, other = start(database), start(database), start(database, namespace="other")
    ids = [service.decide(explore=explore) for service in (one, two) for explore in (True, False)]
    for service, decision_id in zip((two, one, two, one), ids, strict=True):  # also what the other one decided
        assert rewarded(service, decision_id, 0.25).status_code == 201
    assert rewarded(two, ids[1], 0.25).status_code == 200 and rewarded(two, ids[1], 0.75).status_code == 409
    assert one.ask("GET", "/v1/policy").json() == two.ask("GET", "/v1/policy").json()
    assert listed(one) == listed(two) == set(ids)
    key = {"idempotency-key": "the-same-job-on-both"}
    answers = [service.ask("POST", "/v1/decisions", json=PAIR, headers=key) for service in (one, two)]
    assert [answer.status_code for answer in answers] == [201, 200] and answers[0].json() == answers[1].json()
    assert rewarded(other, ids[0]).status_code == 404 and listed(other) == set()
    assert other.ask("GET", "/v1/policy").json()["num_rewards"] == 0
