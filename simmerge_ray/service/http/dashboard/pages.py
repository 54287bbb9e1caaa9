"""Routes of the dashboard: the page, its login, and the files that it ships.

| route | answers |
|---|---|
| GET / | the page; 401 and a form that asks for a token |
| GET /?token=T, POST /login | the token goes into a cookie, then 303 to / |
| POST /logout | the cookie is taken back |
| GET /retention | what merges keep of their members, a page without a script; the same login |
| GET /static/... | files of the page, for whoever may see the page |

All data that changes on the first page comes from the JSON API under /v1, which the page asks with the same cookie.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.staticfiles import StaticFiles

from simmerge_ray.base.errors import StoreError
from simmerge_ray.service.http.dashboard.retention import retention_view
from simmerge_ray.service.http.dashboard.session import forget, remember, same_origin, token_of
from simmerge_ray.service.learner import Learner
from simmerge_ray.service.schemas import CatalogueAnswer
from simmerge_ray.signals.features import SIGNALS

HERE = Path(__file__).parent
ROLES = frozenset({"decide", "reward", "admin"})
MAX_FORM_BYTES = 8192

PAGE_POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'"
)
FORM_POLICY = PAGE_POLICY.replace("script-src 'self'", "script-src 'none'").replace(
    "form-action 'none'", "form-action 'self'"
)

# Not from the machine's own table, which may have any: a browser runs a module as JavaScript alone.
_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

RolesOf = Callable[[str | None], frozenset[str] | None]


def router(source: Callable[[], Learner], roles_of: RolesOf) -> APIRouter:
    """The routes of the page.

    Args:
        source: of what the page shows before its scripts have asked for more. roles_of: the roles of a token, None for
            one that is not known; of no token at all, None where one is needed.
    """
    routes = APIRouter(include_in_schema=False)
    pages, files = _Pages(), StaticFiles(directory=HERE / "static")

    @routes.get("/")
    async def page(request: Request, token: str | None = None) -> Response:
        if token is not None:
            return _enter(pages, roles_of, request, token)
        roles = roles_of(token_of(request))
        if roles is None:
            if request.headers.get("sec-fetch-site") == "cross-site":
                return pages.bounce()
            return pages.login()
        return await _view(pages, source(), roles)

    @routes.get("/retention")
    async def retention(request: Request) -> Response:
        roles = roles_of(token_of(request))
        if roles is None:
            return pages.login()
        view = await retention_view(source(), request.query_params, bool(roles & {"decide", "admin"}))
        return pages.retention(view)

    @routes.post("/login")
    async def login(request: Request) -> Response:
        if not same_origin(request.headers):  # or another page could log its visitor in as somebody else
            return pages.login("Log in from this page, not from another one.", 403)
        body = await request.body()
        if len(body) > MAX_FORM_BYTES:
            return pages.login("That is too long for a token.", 413)
        form = parse_qs(body.decode("utf-8", "replace"))
        return _enter(pages, roles_of, request, form.get("token", [""])[0].strip())

    @routes.post("/logout")
    async def logout(request: Request) -> Response:
        response = Response(status_code=204 if same_origin(request.headers) else 403)
        if response.status_code == 204:
            forget(response)
        return response

    @routes.get("/static/{path:path}")
    async def static(request: Request, path: str) -> Response:
        if roles_of(token_of(request)) is None:
            return Response(status_code=401, headers={"WWW-Authenticate": "Bearer"})
        response = await files.get_response(path, request.scope)
        response.headers["Content-Type"] = f"{_TYPES.get(Path(path).suffix, 'text/plain')}; charset=utf-8"
        response.headers["Cache-Control"] = "no-cache"
        return response

    return routes


def _enter(pages: _Pages, roles_of: RolesOf, request: Request, token: str) -> Response:
    if not token or roles_of(token) is None or not token.isascii():  # no header can carry other characters
        return pages.login("This token is not known here. Nothing was changed.")
    response = RedirectResponse(
        f"{request.scope.get('root_path', '')}/", status_code=303, headers={"Cache-Control": "no-store"}
    )
    remember(response, token, request)
    return response


async def _view(pages: _Pages, source: Learner, roles: frozenset[str]) -> Response:
    catalogue, policy, trouble = CatalogueAnswer(checkpoints=[], tasks=[], arms=[], signals=[]), None, ""
    try:
        catalogue = await source.catalogue()
        policy = await source.policy()
    except StoreError as error:
        trouble = str(error)
    shown = sorted(ROLES if "admin" in roles else roles)
    view = {"catalogue": catalogue, "policy": policy, "trouble": trouble, "roles": shown}
    return pages.dashboard({**view, "signal_groups": _signal_groups(catalogue.signals)}, 503 if trouble else 200)


@dataclass(frozen=True)
class _SignalGroup:
    """Columns of the signal table that are statistics of one signal."""

    meaning: str
    of_weights: bool
    columns: list[str]


def _signal_groups(columns: Iterable[str]) -> list[_SignalGroup]:
    groups: dict[str, _SignalGroup] = {}
    for column in columns:
        # A table of a later version may have columns that this one has no words for.
        signal = next((one for one in SIGNALS.values() if column in one.columns), None)
        name, of_weights = (signal.meaning, signal.of_weights) if signal else ("others", False)
        groups.setdefault(name, _SignalGroup(name, of_weights, [])).columns.append(column)
    return list(groups.values())


class _Pages:
    """Templates, read once."""

    def __init__(self) -> None:
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        # The login page has its style inside, allowed by digest: without a token no other file is served.
        self._style = (HERE / "templates" / "login.css").read_text(encoding="utf-8")
        digest = b64encode(hashlib.sha256(self._style.encode()).digest()).decode()
        self._login_policy = (
            f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; form-action 'self'; "
            "frame-ancestors 'none'; base-uri 'none'"
        )

    def dashboard(self, view: Mapping[str, Any], status: int) -> Response:
        """The page."""
        headers = {"Retry-After": "5"} if status == 503 else {}
        return self._html("dashboard.html", view, status, PAGE_POLICY, headers)

    def retention(self, view: Mapping[str, Any]) -> Response:
        """The page of what merges keep."""
        return self._html("retention.html", view, 200, FORM_POLICY, {})

    def login(self, trouble: str = "", status: int = 401) -> Response:
        """The form that asks for a token."""
        view = {"trouble": trouble, "style": Markup(self._style)}
        own = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        return self._html("login.html", view, status, self._login_policy, own)

    def bounce(self) -> Response:
        """Loads itself again: the browser holds back a SameSite=Strict cookie where a link of another site led here,
        also after the redirect of such a link, and sends it where a page of our own leads.
        """
        return self._html("bounce.html", {}, 401, self._login_policy, {"WWW-Authenticate": "Bearer"})

    def _html(
        self, name: str, view: Mapping[str, Any], status: int, policy: str, headers: Mapping[str, str]
    ) -> Response:
        safe = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "same-origin",
            "Cache-Control": "no-store",
            "Cross-Origin-Opener-Policy": "same-origin",
        }
        body = self._templates.get_template(name).render(view)
        return HTMLResponse(body, status, safe | dict(headers))
