"""Requests from web pages: a browser sends the page's origin with them, and only configured origins are accepted.

Scripts of any page can send requests to a server on this machine; without this check they could load adapters.
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
"""Sec-Fetch-Site of addresses that a person typed, and of the server's own pages; clients other than browsers send
none."""


def allowed_origins() -> list[str]:
    """The plan's origins."""
    return list(json.loads(os.environ.get(ORIGINS, "[]")))


class Origins:
    """Answers 403 to pages of other origins; a page at the server's own numeric address is accepted."""

    def __init__(self, app: ASGIApp, allowed: list[str]) -> None:
        self._app, self._allowed = app, frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._may_ask(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        message = "requests from pages of this origin are not accepted; server.origins lists those that are"
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": "origin_not_allowed"}
        await JSONResponse({"error": error}, 403)(scope, receive, send)

    def _may_ask(self, headers: Headers) -> bool:
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin is None:  # browsers omit it for images and links, and send Sec-Fetch-Site instead
            return headers.get("sec-fetch-site", "none") in OWN_SITES
        if origin in self._allowed:
            return True
        return origin.partition("://")[2] == host and _is_no_name(host)


def _is_no_name(host: str) -> bool:
    """Whether the host is numeric. The owner of a domain can point its name at 127.0.0.1, and scripts of its pages
    could then query a local server as same-origin."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
