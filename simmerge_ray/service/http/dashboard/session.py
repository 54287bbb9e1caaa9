"""Who asks: the token of a request, and whether a browser sent it from a page of ours."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import Response

COOKIE = "simmerge_token"


def token_of(connection: HTTPConnection) -> str | None:
    """The bearer token of the header, else that of the cookie."""
    scheme, _, value = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return connection.cookies.get(COOKIE) or None


def same_origin(headers: Mapping[str, str]) -> bool:
    """Whether a request comes from a page of this service, or from no browser at all.

    For requests that a cookie vouches for: SameSite=Strict holds back the cookie for other sites, but pages on another
    port of the same host are the same site.
    """
    fetched_from = headers.get("sec-fetch-site")
    if fetched_from is not None:
        return fetched_from in ("same-origin", "none")
    origin = headers.get("origin")  # browsers leave Sec-Fetch-Site out on plain HTTP, but for localhost
    return origin is None or urlsplit(origin).netloc == headers.get("host")


def remember(response: Response, token: str, connection: HTTPConnection) -> None:
    """Set the cookie: for this browser session, out of reach of scripts, and of other sites."""
    forwarded = connection.headers.get("x-forwarded-proto", "").split(",")[0].strip()
    secure = "https" in (connection.url.scheme, forwarded)
    response.set_cookie(COOKIE, token, path="/", secure=secure, httponly=True, samesite="strict")


def forget(response: Response) -> None:
    """Take the cookie back."""
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
