"""The routes of the dashboard by themselves: who may see it, what its headers say, and that names stay text."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from simmerge_ray.base.errors import StoreError
from simmerge_ray.service.http.dashboard.pages import router
from simmerge_ray.service.http.dashboard.session import COOKIE, same_origin
from simmerge_ray.service.schemas import CatalogueAnswer, CatalogueCheckpoint, ExamplePair

HOSTILE = '<script>alert("x")</script>'
TOKENS = {"see": frozenset[str](), "ask": frozenset({"decide"}), "all": frozenset({"admin"}), "schlüssel": frozenset()}


class Source:
    """A catalogue and a policy with hostile names, and a log that can be away."""

    def __init__(self) -> None:
        self.away = ""

    async def catalogue(self) -> CatalogueAnswer:
        return CatalogueAnswer(
            checkpoints=[CatalogueCheckpoint(id="a", task=HOSTILE), CatalogueCheckpoint(id="b")],
            tasks=[HOSTILE],
            arms=["linear", HOSTILE],
            signals=["weight_cosine_mean", "kl_lr_mean", HOSTILE],
            example=ExamplePair(left="a", right="b"),
        )

    async def policy(self) -> dict[str, Any]:
        if self.away:
            raise StoreError(self.away)
        arm = {"arm": HOSTILE, "count": 3, "weight": 3.0, "mean": 0.02, "sd": 0.1, "entropy": 0.5}
        counts = {"num_decisions": 12, "num_rewards": 5, "num_closed": 1, "num_open": 6}
        model = {"namespace": HOSTILE, "model_version": "0123456789ab", "epoch": 0, "seq": 20}
        return {**counts, **model, "arms": [arm], "alarm": {"linear": True}}


@pytest.fixture
def source() -> Source:
    return Source()


def client_of(source: Source, roles_of=TOKENS.get, **options: Any) -> httpx.AsyncClient:
    app = FastAPI()
    app.include_router(router(lambda: source, roles_of))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), **{"base_url": "http://service", **options})


def ask(client: httpx.AsyncClient, method: str, path: str, **options: Any) -> httpx.Response:
    """One request, in an event loop of its own."""
    import asyncio

    return asyncio.run(client.request(method, path, **options))


@pytest.fixture
def client(source) -> httpx.AsyncClient:
    return client_of(source)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(
    "headers", [{}, bearer("wrong"), {"Cookie": f"{COOKIE}=wrong"}, {"Authorization": "Basic all"}]
)
def test_without_a_known_token_there_is_only_the_form_that_asks_for_one(client, headers):
    answer = ask(client, "GET", "/", headers=headers)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert 'action="login"' in answer.text and "weight_cosine" not in answer.text
    for path in ("/static/dashboard.css", "/static/js/main.js"):
        answer = ask(client, "GET", path, headers=headers)
        assert answer.status_code == 401 and not answer.content


@pytest.mark.parametrize(
    ("base", "forwarded", "secure"),
    [("http://service", None, False), ("https://service", None, True), ("http://service", "https", True)],
)
def test_a_token_becomes_a_cookie_that_scripts_and_other_sites_do_not_get(source, base, forwarded, secure):
    headers = {} if forwarded is None else {"X-Forwarded-Proto": forwarded}
    for method, path, body in (("POST", "/login", {"token": " ask\n"}), ("GET", "/?token=ask", None)):
        client = client_of(source, base_url=base)
        answer = ask(client, method, path, data=body, headers=headers)
        assert answer.status_code == 303 and answer.headers["location"] == "/"
        cookie = answer.headers["set-cookie"].lower()
        assert cookie.startswith(f"{COOKIE}=ask;") and "path=/" in cookie
        assert "httponly" in cookie and "samesite=strict" in cookie and ("secure" in cookie) == secure
        assert ask(client, "GET", "/", headers={"Cookie": f"{COOKIE}=ask"}).status_code == 200


def test_a_wrong_token_is_said_to_be_wrong_and_is_not_kept(client):
    for method, path, body in (
        ("POST", "/login", {"token": HOSTILE}),
        ("POST", "/login", {"token": ""}),
        ("POST", "/login", {"other": "all"}),
        ("GET", "/?token=wrong", None),
        ("GET", "/?token=schl%C3%BCssel", None),  # known, but no cookie can hold it
    ):
        answer = ask(client, method, path, data=body)
        assert answer.status_code == 401 and "not known" in answer.text and "set-cookie" not in answer.headers
        assert HOSTILE not in answer.text


def test_bodies_that_are_no_form_are_refused(client):
    assert ask(client, "POST", "/login", content=b"token=" + b"x" * 9000).status_code == 413
    assert ask(client, "POST", "/login", content=b"\xff\xfe token").status_code == 401
    assert ask(client, "POST", "/login", content=b"&".join(b"a=%d" % i for i in range(50))).status_code == 401


def test_only_pages_of_the_service_log_in_and_out(client):
    for header in ({"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "http://service:81"}):
        answer = ask(client, "POST", "/login", data={"token": "all"}, headers=header)
        assert answer.status_code == 403 and "set-cookie" not in answer.headers
        answer = ask(client, "POST", "/logout", headers=header)
        assert answer.status_code == 403 and "set-cookie" not in answer.headers
    answer = ask(client, "POST", "/logout", headers={"Origin": "http://service"})
    assert answer.status_code == 204 and f'{COOKIE}="";' in answer.headers["set-cookie"]


@pytest.mark.parametrize(
    ("headers", "same"),
    [
        ({}, True),
        ({"sec-fetch-site": "same-origin", "origin": "null"}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"origin": "http://a:1", "host": "a:1"}, True),
        ({"origin": "http://a:1", "host": "a:2"}, False),
        ({"origin": "null", "host": "a:2"}, False),
    ],
)
def test_same_origin(headers, same):
    assert same_origin(headers) is same


def test_where_no_token_is_needed_the_page_comes_at_once(source):
    answer = ask(client_of(source, lambda token: frozenset({"decide"})), "GET", "/")
    assert answer.status_code == 200 and 'data-roles="decide"' in answer.text


def test_the_page_has_no_script_or_style_of_its_own_and_forbids_them(client):
    answer = ask(client, "GET", "/", headers=bearer("all"))
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert answer.headers["cache-control"] == "no-store" and answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "same-origin"
    assert "<style" not in answer.text and " style=" not in answer.text and " onclick" not in answer.text
    for tag in answer.text.split("<script")[1:]:
        assert tag.startswith(' src="static/')
    assert "//" not in answer.text.replace("||", ""), "nothing comes from another host"


def test_names_stay_text(client):
    answer = ask(client, "GET", "/", headers=bearer("all"))
    assert HOSTILE not in answer.text
    assert (
        answer.text.count("&lt;script&gt;alert(") == 10
    )  # 4 for the task of a, 2 each of tasks and arms, the signal, the namespace


def test_the_first_view_has_the_numbers_without_any_script(client):
    text = ask(client, "GET", "/", headers=bearer("all")).text
    for field, value in {"num-decisions": 12, "num-rewards": 5, "num-open": 6, "num-closed": 1}.items():
        assert f'id="{field}">{value}<' in text
    assert (
        'data-roles="admin decide reward"' in text
        and '<optgroup label="KL(left || right) of next tokens, nats"><option>kl_lr_mean<' in text
    )
    assert 'id="alarm" class="notice warn">' in text and 'id="trouble" role="alert" hidden' in text


def test_a_log_that_is_away_is_said_on_the_page(client, source):
    source.away = "the database cannot be reached: <b>refused</b>"
    answer = ask(client, "GET", "/", headers=bearer("see"))
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert "the database cannot be reached: &lt;b&gt;refused" in answer.text and 'data-roles=""' in answer.text
    assert ">kl_lr_mean<" in answer.text, "what needs no log is there"


def test_a_link_from_another_site_is_led_in_by_a_page_of_our_own(client):
    answer = ask(client, "GET", "/", headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 401 and 'http-equiv="refresh" content="0; url=./"' in answer.text
    assert 'action="login"' in ask(client, "GET", "/", headers={"Sec-Fetch-Site": "same-origin"}).text


def test_files_have_their_types_and_are_asked_for_again_only_when_they_changed(client):
    for path, kind in {
        "dashboard.css": "text/css",
        "js/main.js": "text/javascript",
        "vendor/uplot/uPlot.iife.min.js": "text/javascript",
        "vendor/uplot/LICENSE": "text/plain",
        "icon.svg": "image/svg+xml",
    }.items():
        answer = ask(client, "GET", f"/static/{path}", headers=bearer("see"))
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind), path
        again = bearer("see") | {"If-None-Match": answer.headers["etag"]}
        answer = ask(client, "GET", f"/static/{path}", headers=again)
        assert answer.status_code == 304 and not answer.content


@pytest.mark.parametrize(
    "path", ["/static/../pages.py", "/static/%2e%2e/pages.py", "/static//etc/passwd", "/static/js", "/static/"]
)
def test_there_are_no_other_files(client, path):
    answer = ask(client, "GET", path, headers=bearer("all"))
    assert answer.status_code == 404 and "import" not in answer.text


def test_with_nothing_to_show_the_page_says_why(source):
    class Nothing(Source):
        async def catalogue(self):
            raise StoreError("the event log is empty")

    answer = ask(client_of(Nothing()), "GET", "/", headers=bearer("all"))
    assert answer.status_code == 503 and ">the event log is empty</p>" in answer.text
