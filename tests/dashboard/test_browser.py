"""The dashboard in a browser, on the real service: look, choose, decide, reward, by mouse, by keyboard, on a phone."""

from __future__ import annotations

import re

import pytest

from tests.dashboard.conftest import keep

pytestmark = pytest.mark.slow
PHONES = [{"viewport": {"width": width, "height": 740}, "has_touch": True, "is_mobile": True} for width in (375, 320)]
HOSTILE = "<img src=x onerror=\"document.title='taken over'\">"


def number(page, field: str) -> int:
    return int(page.inner_text(f"#{field}").replace(",", ""))


def choose(page, left: str, right: str) -> None:
    with page.expect_response("**/v1/rank") as ranked:
        page.select_option("#left", left)
        page.select_option("#right", right)
    assert ranked.value.ok


def decided(page) -> str:
    """Press Decide; the id of the decision."""
    with page.expect_response(lambda one: one.url.endswith("/v1/decisions") and one.request.method == "POST") as answer:
        page.click("#decide")
    decision_id = answer.value.json()["decision_id"]
    page.wait_for_selector(f'#decided:text-is("{decision_id}")')  # the one of before may still be there
    return decision_id


def row(page, decision_id: str):
    return page.locator("#decisions-table tr", has=page.locator(f'[data-decision="{decision_id}"]'))


def opened(page, decision_id: str):
    """The dialog of a decision, which may be on another page of the list."""
    page.fill("#lookup-id", decision_id)
    page.press("#lookup-id", "Enter")
    page.wait_for_selector("#detail-status")
    return page.locator("#detail")


def refuse(page, status: int) -> None:
    """Answer decisions as a service in trouble does."""
    headers = {"Retry-After": "7"} if status in (429, 503) else {}

    def answer(route):
        if route.request.method == "POST":
            route.fulfill(status=status, json={"detail": "because of this"}, headers=headers)
        else:
            route.fallback()

    page.route("**/v1/decisions", answer)


def has_no_sideways_scroll(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_log_in_choose_decide_reward_and_see_it_appear(service, visitor):
    page = visitor.visit()
    page.fill("#token", "wrong")
    page.press("#token", "Enter")
    assert "not known" in page.inner_text("#trouble")
    page.fill("#token", service.tokens["admin"])
    page.click("text=Log in")
    page.wait_for_selector('#connection[data-state="live"]')
    assert page.url == f"{service.url}/", "the token is in no address"

    before = number(page, "num-decisions"), number(page, "num-rewards")
    left, right = service.pairs[1]
    choose(page, left, right)
    expected = service.ask("POST", "/v1/rank", {"left": left, "right": right, "task": None})
    page.wait_for_function(
        "text => document.querySelector('#answer').innerText.includes(text)", arg=f"{left} + {right}"
    )
    shown = page.locator("#answer tbody th .arm").all_inner_texts()
    assert shown == [one["arm"] for one in sorted(expected["arms"], key=lambda one: -one["utility"])]
    assert page.locator("#answer svg.interval").count() == len(shown)
    assert page.locator("#answer .why li").count() >= 1, "the signals that say most"

    decision_id = decided(page)
    made = service.ask("GET", f"/v1/decisions/{decision_id}")
    assert (made["decision"]["left"], made["decision"]["right"], made["status"]) == (left, right, "open")
    row(page, decision_id).wait_for()
    assert "open" in row(page, decision_id).inner_text()
    keep(page, "decided", full_page=True)

    page.click("text=Open the decision")
    page.fill("#reward-value", "0.625")
    page.click("text=Record the reward")
    page.wait_for_selector("text=The reward 0.625 is recorded.")
    keep(page, "rewarded")
    page.keyboard.press("Escape")
    assert service.ask("GET", f"/v1/decisions/{decision_id}")["utility"] == 0.625
    row(page, decision_id).filter(has_text="rewarded").filter(has_text="0.625").wait_for()
    page.wait_for_function("n => document.querySelector('#num-rewards').innerText === String(n)", arg=before[1] + 1)
    assert number(page, "num-decisions") == before[0] + 1
    page.wait_for_selector("#curve canvas")


def test_what_others_do_appears_by_itself(service, visitor):
    page = visitor.visit(service.tokens["reward"])
    left, right = service.pairs[0]
    made = service.ask("POST", "/v1/decisions", {"left": left, "right": right})["decision_id"]
    row(page, made).filter(has_text="open").wait_for()
    rewards = {arm["arm"]: arm["count"] for arm in service.ask("GET", "/v1/policy")["arms"]}
    service.ask("POST", f"/v1/decisions/{made}/reward", {"utility": 0.5})
    row(page, made).filter(has_text="rewarded").filter(has_text="0.500").wait_for()
    total = sum(rewards.values())
    cells = "[...document.querySelectorAll('#posterior td[data-label=Seen]')]"
    page.wait_for_function(f"n => {cells}.reduce((sum, one) => sum + Number(one.innerText), 0) > n", arg=total)
    assert sorted(page.locator("#posterior tbody .arm").all_inner_texts()) == sorted(rewards)


def test_plans_of_several_checkpoints_are_ranked_and_decided_on(service, visitor):
    page = visitor.visit(service.tokens["admin"])
    with page.expect_response("**/v1/plans"):
        page.check('input[value="plan"]', force=True)
    page.fill("#find", service.checkpoints[0])
    boxes = page.locator("#picks label:visible")
    assert boxes.count() == 1
    boxes.locator("input").check()
    page.fill("#find", "")

    def of_all_three(response):
        asked = response.request.post_data_json if response.url.endswith("/v1/plans") else {}
        return asked.get("checkpoints") == service.checkpoints[:3]

    with page.expect_response(of_all_three) as answer:
        for one in service.checkpoints[1:3]:
            page.check(f'#picks input[value="{one}"]')
    plans = answer.value.json()["plans"]
    page.wait_for_function("n => document.querySelectorAll('#answer tbody tr').length === n", arg=len(plans))
    assert page.locator("#answer tbody th .arm").first.inner_text() == plans[0]["label"]
    keep(page, "plans", full_page=True)
    decision_id = decided(page)
    made = service.ask("GET", f"/v1/decisions/{decision_id}")["decision"]
    assert made["kind"] == "plan" and made["plan"]["label"] in opened(page, decision_id).inner_text()


def test_a_checkpoint_that_is_kept_is_not_said_to_be_made(service, visitor):
    page, (left, right) = visitor.visit(service.tokens["admin"]), service.pairs[1]

    def answer(route):
        if route.request.method != "POST":
            return route.fallback()
        response = route.fetch()
        plan = {"id": "p", "label": f"keep({left})", "utility": 0.9, "sd": 0.1, "why": [], "plan": {"source": left}}
        return route.fulfill(response=response, json=response.json() | {"arm": plan["label"], "plan": plan})

    page.route("**/v1/decisions", answer)
    choose(page, left, right)
    decided(page)
    assert page.inner_text("#answer .notice").replace("\u200b", "") == f"Decided and recorded: keep({left})"


def test_pressing_again_after_a_lost_answer_makes_no_second_decision(service, visitor):
    page = visitor.visit(service.tokens["decide"])
    visitor.allowed += ["ERR_FAILED", "Failed to load resource"]
    made = []

    def lose(route):
        made.append(route.fetch().json()["decision_id"])
        route.abort()

    page.route("**/v1/decisions", lambda route: lose(route) if route.request.method == "POST" else route.fallback())
    page.click("#decide")
    notice = page.wait_for_selector("#answer .notice.bad")
    assert "pressing again is safe" in notice.inner_text() and len(made) == 1
    page.unroute("**/v1/decisions")
    assert decided(page) == made[0]
    second = decided(page)
    assert second != made[0], "an answer that came ends it: the next one is a new decision"


def test_each_role_sees_what_it_may_do(service, visitor):
    left, right = service.pairs[0]
    made = service.ask("POST", "/v1/decisions", {"left": left, "right": right})["decision_id"]
    may = {"decide": (True, False), "reward": (False, True), "admin": (True, True)}
    for role, (asks, rewards) in may.items():
        visitor.context.clear_cookies()
        page = visitor.visit(service.tokens[role])
        assert page.is_visible("#decide") == asks and page.is_visible("#no-decide") != asks
        opened(page, made)
        assert page.is_visible("#reward-value") == page.is_visible("#close-reason") == rewards
        if not rewards:
            assert "has not the role “reward”" in page.inner_text("#detail")
        page.close()
    service.ask("POST", f"/v1/decisions/{made}/reward", {"utility": 0.4})
    visitor.context.clear_cookies()
    page = visitor.visit(service.tokens["admin"])
    opened(page, made)
    page.fill("#void-reason", "measured on the wrong split")
    page.click("text=Take the reward back")
    page.wait_for_selector("text=The reward is taken back")
    assert service.ask("GET", f"/v1/decisions/{made}")["status"] == "open" and page.is_visible("#reward-value")


def test_refusals_are_said_in_words(service, visitor):
    page = visitor.visit(service.tokens["admin"])
    visitor.allowed.append("Failed to load resource")
    left, right = service.pairs[0]
    first, second = (service.ask("POST", "/v1/decisions", {"left": left, "right": right})["decision_id"] for _ in "ab")
    opened(page, first)
    service.ask("POST", f"/v1/decisions/{first}/reward", {"utility": 0.1})
    page.fill("#reward-value", "0.9")
    page.click("text=Record the reward")
    assert "contradicts what is recorded" in page.wait_for_selector("#detail .notice.bad:visible").inner_text()
    page.keyboard.press("Escape")
    opened(page, second)
    service.ask("POST", f"/v1/decisions/{second}/close", {"reason": "infeasible: the disk was full"})
    page.fill("#reward-value", "0.9")
    page.click("text=Record the reward")
    assert "Too late" in page.wait_for_selector("#detail .notice.bad:visible").inner_text()
    page.keyboard.press("Escape")
    opened(page, second)
    assert "infeasible: the disk was full" in page.inner_text("#detail") and not page.is_visible("#reward-value")
    page.keyboard.press("Escape")
    answers = {403: "may not do this", 422: "not accepted", 429: "try again in 7 s", 503: "cannot record this now"}
    for status, words in answers.items():
        refuse(page, status)
        page.click("#decide")
        page.wait_for_function(
            "text => document.querySelector('#answer > .notice')?.innerText.includes(text)", arg=words
        )
        assert "because of this" in page.inner_text("#answer > .notice")
        assert page.locator("#answer tbody tr").count(), "what was shown before stays"
        page.unroute("**/v1/decisions")


def test_a_lost_connection_is_said_and_found_again(service, visitor):
    page = visitor.visit(service.tokens["admin"])
    visitor.allowed.append("Failed to load resource")
    before = page.inner_text("#num-decisions")
    visitor.context.set_offline(True)
    page.wait_for_selector('#connection[data-state="lost"]')
    assert page.inner_text("#connection-text") == "connection lost"
    assert "What you see is from" in page.inner_text("#trouble") and page.inner_text("#num-decisions") == before
    keep(page, "connection-lost")
    visitor.context.set_offline(False)
    page.wait_for_selector('#connection[data-state="live"]')
    assert page.is_hidden("#trouble")


def test_text_of_others_stays_text(service, visitor):
    left, right = service.pairs[0]
    made = service.ask("POST", "/v1/decisions", {"left": left, "right": right})["decision_id"]
    service.ask("POST", f"/v1/decisions/{made}/close", {"reason": HOSTILE})
    page = visitor.visit(service.tokens["admin"])
    opened(page, made)
    assert HOSTILE in page.inner_text("#detail")
    page.keyboard.press("Escape")
    visitor.allowed.append("Failed to load resource")
    page.fill("#lookup-id", HOSTILE)
    page.press("#lookup-id", "Enter")
    page.wait_for_selector("#detail .notice.bad")
    assert HOSTILE in page.inner_text("#detail-title")
    assert page.title() == "simmerge_ray" and page.locator("img").count() == 0


def test_even_a_service_of_hostile_names_runs_no_script(service, visitor):
    """Every string of every answer is markup, but those that the page works with."""
    kept = {"decision_id", "kind", "status", "left", "right", "id"}

    def spoilt(value, name=None):
        if isinstance(value, dict):
            return {key: spoilt(one, key) for key, one in value.items()}
        if isinstance(value, list):
            return [spoilt(one, name) for one in value]
        return HOSTILE if isinstance(value, str) and name not in kept else value

    def spoil(route):
        answer = route.fetch()
        route.fulfill(response=answer, json=spoilt(answer.json()))

    visitor.context.route("**/v1/**", spoil)
    page = visitor.visit(service.tokens["admin"])
    page.wait_for_selector("#answer tbody tr")
    decision_id = decided(page)
    row(page, decision_id).wait_for()
    opened(page, decision_id)
    page.hover("#heat td[data-row] >> nth=1", force=True)
    assert HOSTILE in page.inner_text("#posterior") and HOSTILE in page.inner_text("#detail")
    assert page.title() == "simmerge_ray" and page.locator("img").count() == 0


def test_the_policy_of_the_page_is_enforced(service, visitor):
    """What the other tests rely on: markup that gets in is not run, and the visitor's list tells of it."""
    page = visitor.visit(service.tokens["reward"])
    page.evaluate("html => { document.querySelector('#announce').innerHTML = html }", HOSTILE)
    page.evaluate("document.querySelector('#announce').setAttribute('style', 'color: red')")
    page.wait_for_timeout(500)
    assert page.title() == "simmerge_ray"
    assert any("script-src" in one for one in visitor.troubles) and any("style-src" in one for one in visitor.troubles)
    visitor.allowed += ["forbidden: script-src", "forbidden: style-src", "Content Security Policy", "404 (Not Found)"]


@pytest.mark.parametrize("visitor", PHONES, ids=["375", "320"], indirect=True)
def test_on_a_phone_nothing_needs_scrolling_sideways(service, visitor):
    page = visitor.visit(service.tokens["admin"])
    page.wait_for_selector("#answer tbody tr")
    assert has_no_sideways_scroll(page)
    decision_id = decided(page)
    row(page, decision_id).wait_for()
    page.check('input[value="plan"]', force=True)
    page.wait_for_selector("#picks:visible")
    page.click("#catalogue-list summary")
    assert has_no_sideways_scroll(page)
    keep(page, f"phone-{page.viewport_size['width']}", full_page=True)
    opened(page, decision_id)
    box = page.locator("#detail").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= page.viewport_size["width"]
    assert page.evaluate(
        "document.querySelector('#detail').scrollWidth <= document.querySelector('#detail').clientWidth"
    )
    keep(page, f"phone-{page.viewport_size['width']}-decision")


def test_everything_goes_by_keyboard(service, visitor):
    page = visitor.visit(service.tokens["admin"])
    page.wait_for_selector("#answer tbody tr")

    def tab_to(selector: str, most: int = 120) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"Tab does not reach {selector}")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip" and page.locator(".skip").is_visible()
    page.keyboard.press("Enter")
    tab_to('[name="curve-kind"]')
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("text=best fixed, estimated") if page.is_visible("#curve") else None
    tab_to("#left")
    page.keyboard.press("End")
    assert page.input_value("#left") == service.checkpoints[-1]
    tab_to("#right")
    page.keyboard.press("Home")
    assert page.input_value("#right") == service.checkpoints[0]
    tab_to("#decide")
    page.keyboard.press("Enter")
    page.wait_for_selector("#decided")
    decision_id = page.inner_text("#decided")
    page.wait_for_function("document.activeElement.innerText === 'Open the decision'")
    page.keyboard.press("Enter")
    page.wait_for_selector("#reward-value")
    tab_to("#reward-value", 5)
    page.keyboard.type("0.75")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=The reward 0.75 is recorded.")
    page.keyboard.press("Escape")
    assert not page.is_visible("#detail")
    row(page, decision_id).filter(has_text="rewarded").wait_for()
    tab_to(f'[data-decision="{decision_id}"]')
    with page.expect_response("**/v1/decisions?*"):  # the list is made anew, and the focus stays
        service.ask("POST", "/v1/decisions", {"left": service.checkpoints[0], "right": service.checkpoints[1]})
    page.wait_for_timeout(300)
    assert page.evaluate("document.activeElement.dataset.decision") == decision_id
    tab_to("#heat td")
    page.keyboard.press("ArrowRight")
    first, second = service.checkpoints[:2]
    assert page.inner_text("#readout").startswith(f"{first} (left), {second} (right): ")
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.matches('#heat td')"), "one stop for the whole table"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    assert (page.input_value("#left"), page.input_value("#right")) == (first, second)
    assert page.evaluate("document.activeElement.id") == "left"


def test_every_field_button_and_picture_has_a_name(service, visitor):
    page = visitor.visit(service.tokens["admin"])
    page.wait_for_selector("#answer tbody tr")
    opened(page, decided(page))
    fields = "input, select, button, a, svg[role=img], canvas[role=img], [role=grid]"
    name = "one.labels?.length || one.ariaLabel || one.getAttribute('aria-label') || one.innerText?.trim()"
    all_fields = f"[...document.querySelectorAll({fields!r})]"
    unnamed = page.evaluate(f"{all_fields}.filter((one) => !({name})).map((one) => one.outerHTML)")
    assert unnamed == []
    assert page.evaluate("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size") == page.evaluate(
        "document.querySelectorAll('[id]').length"
    ), "ids are unique"
    assert page.locator("[tabindex]:not([tabindex='0']):not([tabindex='-1'])").count() == 0, (
        "the order is that of the page"
    )


def test_the_heat_map_shows_what_the_table_holds(service, visitor):
    page = visitor.visit(service.tokens["reward"])
    for signal in service.signals[-2:]:
        with page.expect_response(re.compile(r"/v1/signals\?")) as answer:
            page.select_option("#signal", signal)
        values = answer.value.json()["values"]
        page.wait_for_function("text => document.querySelector('#heat table').ariaLabel.startsWith(text)", arg=signal)
        cells = page.locator("#heat td[data-row]")
        assert cells.count() == sum(len(line) for line in values)
        known = sorted({one for line in values for one in line if one is not None})
        colours = {}
        for cell in cells.all():
            value = values[int(cell.get_attribute("data-row"))][int(cell.get_attribute("data-column"))]
            assert ("none" in (cell.get_attribute("class") or "")) == (value is None)
            if value is not None:
                colours[value] = cell.evaluate("one => one.style.backgroundColor")
        assert colours[known[0]] == "rgb(68, 1, 84)" and colours[known[-1]] == "rgb(253, 231, 37)"
    page.fill("#signal-find", service.checkpoints[0])
    page.wait_for_function("() => document.querySelectorAll('#heat td[data-row]').length === 1")


@pytest.mark.parametrize("visitor", [{"color_scheme": "dark"}], ids=["dark"], indirect=True)
def test_it_is_dark_where_the_system_is_dark(service, visitor):
    page = visitor.visit(service.tokens["admin"])
    page.wait_for_selector("#answer tbody tr")

    def brightness(name: str) -> float:
        colour = page.evaluate(f"getComputedStyle(document.body).{name}")
        return sum(int(value) for value in re.findall(r"\d+", colour)[:3]) / 3

    assert brightness("backgroundColor") < 60 < 180 < brightness("color")
    keep(page, "dark", full_page=True)
    page.emulate_media(color_scheme="light")
    assert brightness("backgroundColor") > 180 > 60 > brightness("color")
    keep(page, "light", full_page=True)


def test_a_link_of_another_site_leads_in_and_logging_out_leads_out(service, visitor):
    visitor.allowed.append("401 (Unauthorized)")  # the page in between
    page = visitor.context.new_page()
    link = f'<a href="{service.url}/?token={service.tokens["reward"]}">dashboard</a>'
    page.route("http://chat.test/", lambda route: route.fulfill(body=link, content_type="text/html"))
    page.goto("http://chat.test/")
    page.click("a")
    page.wait_for_selector('#connection[data-state="live"]')
    (cookie,) = visitor.context.cookies(service.url)
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"
    assert "simmerge_token" not in page.evaluate("document.cookie")
    page.click("#logout")
    page.wait_for_selector("#token")
    assert visitor.context.cookies(service.url) == []
