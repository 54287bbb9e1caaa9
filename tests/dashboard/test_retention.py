"""What merges keep of their members, as a page: the numbers of the API, readable by all, without any script."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest

from tests.dashboard.conftest import keep, service_of
from tests.dashboard.serving import Service
from tests.unit.service.answering import write_answering

pytestmark = pytest.mark.slow
PHONE = {"viewport": {"width": 375, "height": 740}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    files = write_answering(tmp_path_factory.mktemp("answering"))
    with service_of(files.settings(tmp_path_factory.mktemp("service"))) as one:
        yield one


def opened(service, visitor, query: str = ""):
    """The page, by a link of the dashboard and the cookie that it has set."""
    page = visitor.visit(service.tokens["decide"])
    page.click("text=Retention")
    page.wait_for_selector(".keeping")
    if query:
        page.goto(f"{service.url}/retention?{query}")
    return page


def shares(page, label: str) -> list[str]:
    row = page.locator("table.kept tr", has=page.locator(f'.arm:text-is("{label}")'))
    return [text.strip() for text in row.locator("td.share").all_inner_texts()]


def test_it_shows_what_the_api_says(service, visitor):
    page = opened(service, visitor)
    body = {"checkpoints": service.checkpoints, "ways": "2-4", "top": 10, "by": "retention"}
    answer = service.ask("POST", "/v1/plans", body)
    assert [one["checkpoint"] for one in answer["owners"]] == service.checkpoints
    for plan in [answer["plans"][0], answer["plans"][-1], *answer["checkpoints"]]:
        assert shares(page, plan["label"]) == [f"{100 * share:.0f} %" for share in plan["retention"]]
    assert page.locator("#recipes tr").count() == 1 + len(answer["plans"])
    assert page.locator("#as-they-are .arm").all_inner_texts() == [one["label"] for one in answer["checkpoints"]]
    keep(page, "retention", full_page=True)


def test_the_curve_of_two_members_that_were_picked(service, visitor):
    page = opened(service, visitor)
    page.select_option("#left", "m2")
    page.select_option("#right", "m1")
    page.fill("#scale", "1.5")
    page.click("text=Show")
    page.wait_for_selector('h3:text-is("Between m2 and m1")')
    page.click("summary:text('The same as a table')")
    rows = [row.split() for row in page.locator("article table tbody tr").all_inner_texts() if row[:1].isdigit()]
    weights = {"m2": 0.5 * 1.5, "m1": 0.5 * 1.5}
    members = [{"checkpoint": name, "weight": weight} for name, weight in weights.items()]
    half = service.ask("POST", "/v1/rank", {"recipes": [{"operator": "task_arithmetic", "members": members}]})
    kept = dict(zip([one["checkpoint"] for one in half["owners"]], half["plans"][0]["retention"], strict=True))
    shown = next(row for row in rows if row[0] == "0.50")
    assert shown == ["0.50", f"{kept['m2']:.3f}", f"{kept['m1']:.3f}", f"{half['plans'][0]['score']:.3f}"]
    assert page.locator("svg.keeping polyline").count() == 3
    assert page.locator(".of-line").all_text_contents() == ["m2", "m1", "score"], "names, not colours alone"
    places = sorted(one.bounding_box()["y"] for one in page.locator(".of-line").all())
    assert min(b - a for a, b in zip(places, places[1:], strict=False)) >= 14, "no name covers another"


@pytest.mark.parametrize("visitor", [PHONE], indirect=True)
def test_it_fits_a_phone(service, visitor):
    page = opened(service, visitor)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    keep(page, "retention-phone", full_page=True)


def get(service, role: str | None, query: str = "") -> httpx.Response:
    headers = {"authorization": f"Bearer {service.tokens[role]}"} if role else {}
    return httpx.get(f"{service.url}/retention{query}", headers=headers, timeout=60)


def test_who_may_not_ask_sees_why_and_who_has_no_token_is_asked_for_one(service):
    assert "Your token may look, but not ask" in get(service, "reward").text
    answer = get(service, None)
    assert answer.status_code == 401 and 'action="login"' in answer.text


@pytest.mark.parametrize(
    "query", ["left=nobody&right=", "scale=nan", "scale=1e999&left=m1&right=m1", "scale=x&member=m0", "member=<b>x"]
)
def test_what_does_not_fit_is_replaced_by_what_does(service, query):
    answer = get(service, "decide", f"?{query}")
    assert answer.status_code == 200 and "polyline" in answer.text and "<b>x" not in answer.text
    assert not re.search(r"nan|inf\b", re.sub(r"<style.*?</style>", "", answer.text))
    assert "script-src 'none'" in answer.headers["content-security-policy"]
