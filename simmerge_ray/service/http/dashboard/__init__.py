"""The page at `/`: what the service knows and does, to look at and to try. It talks to the JSON API like any client."""

from __future__ import annotations

from simmerge_ray.service.http.dashboard.pages import router
from simmerge_ray.service.http.dashboard.session import COOKIE, same_origin, token_of

__all__ = ["COOKIE", "router", "same_origin", "token_of"]
