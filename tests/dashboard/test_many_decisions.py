"""The dashboard of a service that has made ten thousand decisions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simmerge_ray.service.log.database import open_database
from simmerge_ray.service.log.event_log import EventLog
from simmerge_ray.service.log.events import DecisionMade, RewardGiven
from simmerge_ray.service.log.outcomes import Status
from tests.dashboard.conftest import keep

pytestmark = pytest.mark.slow
NUM = 10_000


@pytest.fixture(scope="module", autouse=True)
def ten_thousand(service) -> None:
    """Straight into the log: copies of real decisions, four of five with a reward."""
    left, right = service.pairs[0]
    made = [service.ask("POST", "/v1/decisions", {"left": left, "right": right})["decision_id"] for _ in range(8)]
    engine = open_database(service.settings.database)
    log = EventLog(engine)
    models = [next(row.event for row in log.history(one) if row.kind == "decision") for one in made]
    generator = np.random.default_rng(0)
    events: list[DecisionMade | RewardGiven] = []
    for index in range(NUM - len(models)):
        model = models[index % len(models)]
        name = f"many-{index:05d}"
        events.append(replace(model, decision_id=name, answer={**model.answer, "decision_id": name}))
        if index % 5:
            events.append(RewardGiven(name, float(generator.uniform(0.4, 0.8))))
    outcomes = [one.result() for one in [log.submit(event) for event in events]]
    log.close()
    engine.dispose()
    assert {one.status for one in outcomes} == {Status.CREATED}


def test_the_page_loads_and_turns_pages(service, visitor):
    policy = service.ask("GET", "/v1/policy")
    assert policy["num_decisions"] == NUM and policy["num_rewards"] > 0.79 * NUM
    page = visitor.visit(service.tokens["admin"])
    rows = page.locator("#decisions-table tbody tr")
    rows.first.wait_for()
    assert page.inner_text("#num-decisions") == "10,000"
    size, num_nodes = rows.count(), page.evaluate("document.querySelectorAll('*').length")
    assert size <= 50 and num_nodes < 5000, "the page does not grow with the log"
    curve = service.ask("GET", "/v1/rewards/curve?points=300")
    assert curve["num"] == policy["num_rewards"] and len(curve["seq"]) <= 300
    page.wait_for_selector("#curve canvas")
    page.click("#curve-table summary")
    table = page.locator("#curve-table tbody tr")
    table.first.wait_for()
    assert table.count() <= 21
    assert table.last.locator("th").inner_text() == f"{curve['seq'][-1]:,}"
    keep(page, "ten-thousand", full_page=True)

    def shown() -> list[str]:
        return page.locator("[data-decision]").evaluate_all("all => all.map((one) => one.dataset.decision)")

    def turn(button: str) -> list[str]:
        had = shown()[0]
        page.click(f"#{button}")
        page.wait_for_function("id => document.querySelector('[data-decision]').dataset.decision !== id", arg=had)
        return shown()

    first = shown()
    assert page.is_disabled("#newer") and first[0] == f"many-{NUM - 9:05d}"
    seen = [*first]
    for _ in range(3):
        seen += turn("older")
    assert len(seen) == len(set(seen)) == 4 * size, "no decision twice"
    assert seen == sorted(seen, reverse=True), "newest first, and none left out"
    assert [int(one[5:]) for one in seen] == list(range(NUM - 9, NUM - 9 - 4 * size, -1))
    assert turn("newer") == seen[2 * size : 3 * size]
    assert turn("newest") == first


def test_an_older_page_stays_while_decisions_are_made(service, visitor):
    page = visitor.visit(service.tokens["admin"])
    page.locator("[data-decision]").first.wait_for()
    newest = page.locator("[data-decision]").first.get_attribute("data-decision")
    page.click("#older")
    page.wait_for_function("id => document.querySelector('[data-decision]').dataset.decision !== id", arg=newest)
    older = page.locator("[data-decision]").first.get_attribute("data-decision")
    left, right = service.pairs[1]
    with page.expect_response("**/v1/decisions?*"):
        made = service.ask("POST", "/v1/decisions", {"left": left, "right": right})["decision_id"]
    page.wait_for_function(f"document.querySelector('#num-decisions').innerText === '{NUM + 1:,}'")
    assert page.locator("[data-decision]").first.get_attribute("data-decision") == older
    page.click("#newest")
    page.wait_for_selector(f'[data-decision="{made}"]')


def test_the_very_first_decision_can_be_opened(service, visitor):
    page = visitor.visit(service.tokens["admin"])
    page.fill("#lookup-id", "many-00000")
    page.press("#lookup-id", "Enter")
    page.wait_for_selector("#detail-status")
    assert "open" in page.inner_text("#detail-status")
