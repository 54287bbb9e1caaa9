"""A browser, Debian's Chromium driven by Playwright, and the real service for it to look at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from simmerge_ray.base.config import ServiceConfig
from simmerge_ray.service.http.access import ROLES, Access, Principal, token_digest
from simmerge_ray.service.http.api import create_app
from simmerge_ray.service.learner import Learner
from simmerge_ray.service.log.database import upgrade_database
from simmerge_ray.service.metrics import PrometheusMetrics
from tests.dashboard.serving import Service, served
from tests.unit.service.published import PublishedFiles, write_published

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

ARTIFACTS = Path(__file__).parents[2] / "test-artifacts" / "dashboard"
# Tells the console of what the browser did not run; set before any script of a page.
WATCH = """
addEventListener("securitypolicyviolation", (event) =>
  console.error(`forbidden: ${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
"""


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedFiles:
    """A selector and a signal table of six checkpoints."""
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def service(published: PublishedFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of the module's own, with its log in SQLite and a token for each role."""
    with service_of(published.settings(tmp_path_factory.mktemp("service"))) as one:
        yield one


@contextmanager
def service_of(settings: ServiceConfig) -> Iterator[Service]:
    """A service with these settings, until the block ends."""
    upgrade_database(settings.database)
    tokens = {role: f"token-of-{role}-{'x' * 16}" for role in ROLES}
    access = Access([Principal(role, frozenset({role}), token_digest(token)) for role, token in tokens.items()])
    with served(create_app(lambda: Learner(settings), access, PrometheusMetrics())) as url:
        yield Service(url, tokens, settings)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for the tests of a module: while it is open, nothing else can run an event loop in this thread."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield opened
        opened.close()


class Visitor:
    """Pages of one browser context, and what went wrong on them.

    allowed: parts of console errors that a test expects.
    """

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.context, self.url = context, url
        self.troubles: list[str] = []
        self.allowed: list[str] = []
        context.add_init_script(WATCH)
        context.on("console", lambda message: message.type == "error" and self.troubles.append(message.text))
        context.on("weberror", lambda error: self.troubles.append(f"uncaught: {error.error}"))

    def visit(self, token: str | None = None) -> Page:
        """A new page on the dashboard, with a token where one is given; it waits until everything has loaded."""
        page = self.context.new_page()
        if token is None:
            self.allowed.append("401 (Unauthorized)")
            page.goto(self.url)
            return page
        page.goto(f"{self.url}/?token={token}")
        page.wait_for_selector('#connection[data-state="live"]')
        page.wait_for_selector("#heat td[data-row]")
        return page

    def unexpected(self) -> list[str]:
        """Errors that no test said it expects."""
        return [one for one in self.troubles if not any(part in one for part in self.allowed)]


@pytest.fixture
def visitor(browser: Browser, service: Service, request: pytest.FixtureRequest) -> Iterator[Visitor]:
    """A new browser context; afterwards no page may have had an error, or been kept from anything by its policy."""
    options = {"viewport": {"width": 1280, "height": 900}, "timezone_id": "UTC", "locale": "en-GB"}
    context = browser.new_context(**{**options, **getattr(request, "param", {})})
    context.set_default_timeout(60_000)
    one = Visitor(context, service.url)
    yield one
    context.close()
    assert one.unexpected() == []


def keep(page: Page, name: str, **options: Any) -> None:
    """A screenshot for people to look at, in test-artifacts/."""
    page.evaluate("scrollTo({ top: 0, behavior: 'instant' })")  # the header sticks to where the page was
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"{name}.png", **options)
