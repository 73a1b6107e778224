"""Requests of web pages: a browser sends the page's origin with them, and only pages that are named may ask.

Scripts of any page can send requests to a server of this machine; without this they could load adapters there.
"""

from __future__ import annotations

import ipaddress
import json
import os
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from kt_model.contract import ORIGINS

OWN_SITES = ("none", "same-origin")
"""Sec-Fetch-Site of what a person typed, and of the server's own pages; other clients than browsers have none."""


def allowed_origins() -> list[str]:
    """Those of the plan."""
    return list(json.loads(os.environ.get(ORIGINS, "[]")))


class Origins:
    """Answers 403 to the pages of others; a page of the server's own address is none of them, if that is a number."""

    def __init__(self, app: ASGIApp, allowed: list[str]) -> None:
        self._app, self._allowed = app, frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._may_ask(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        message = "pages of this origin may not ask here; the server's server.origins names those that may"
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": "origin_not_allowed"}
        await JSONResponse({"error": error}, 403)(scope, receive, send)

    def _may_ask(self, headers: Headers) -> bool:
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin is None:  # browsers leave it out of pictures and links, and say where these stand
            return headers.get("sec-fetch-site", "none") in OWN_SITES
        if origin in self._allowed:
            return True
        return origin.partition("://")[2] == host and _is_no_name(host)


def _is_no_name(host: str) -> bool:
    """Whether nobody can point it at this machine. Whoever has a domain can let its name mean 127.0.0.1, after which
    scripts of its pages ask a server here as if it were their own."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
