"""Requests from web pages: a browser sends the page's origin with them, and only configured origins are accepted.

Scripts of any page can send requests to a server on this machine; without this check they could load adapters. The
owner of a page's name can point it at this machine, too; then a browser takes the server for the page's own, sends no
origin with what is only read, and only the name in Host differs.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kt_model.contract import ORIGINS
from kt_sglang.edge.errors import openai_answer
from kt_sglang.edge.requests import Refused

OWN_SITES = ("none", "same-origin")
"""Sec-Fetch-Site of addresses that a person typed, and of the server's own pages; clients other than browsers send
none."""
AUTHORITY = re.compile(r"(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::\d+)?", re.ASCII)
"""A host, with or without a port. SGLang's check of keys reads the path from an address that is put together with this
header, and some versions of Starlette take what follows a slash in it for a path that needs no key."""


def allowed_origins() -> list[str]:
    """The plan's origins."""
    return list(json.loads(os.environ.get(ORIGINS, "[]")))


class Origins:
    """Answers 403 to pages of other origins; a page at the server's own numeric address is accepted.

    for_this_machine: the server listens on a loopback address and asks for no key. Then Host is numeric, localhost, or
    the host of an allowed origin.
    """

    def __init__(self, app: ASGIApp, allowed: list[str], for_this_machine: bool = False) -> None:
        self._app, self._allowed, self._for_this_machine = app, frozenset(allowed), for_this_machine
        self._hosts = frozenset(urlsplit(origin).hostname for origin in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else None
        if headers is None:
            await self._app(scope, receive, send)
        elif not self._is_sound(hosts := headers.getlist("host")):
            refused = Refused(400, "", "the header Host is no host and port", "host_not_valid")
            await openai_answer(refused)(scope, receive, send)
        elif hosts and not self._answers_to(hosts[0]):
            message = "this server answers to numeric addresses and localhost; server.origins lists other names"
            await openai_answer(Refused(403, "", message, "host_not_allowed"))(scope, receive, send)
        elif not self._may_ask(headers):
            message = "requests from pages of this origin are not accepted; server.origins lists those that are"
            await openai_answer(Refused(403, "", message, "origin_not_allowed"))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    @staticmethod
    def _is_sound(hosts: list[str]) -> bool:
        """HTTP/1.0 has none."""
        return len(hosts) <= 1 and all(AUTHORITY.fullmatch(host) for host in hosts)

    def _answers_to(self, host: str) -> bool:
        return not self._for_this_machine or _is_no_name(host) or urlsplit(f"//{host}").hostname in self._hosts

    def _may_ask(self, headers: Headers) -> bool:
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin is None:  # browsers omit it for images and links, and send Sec-Fetch-Site instead
            return headers.get("sec-fetch-site", "none") in OWN_SITES
        if origin in self._allowed:
            return True
        return origin.partition("://")[2] == host and _is_no_name(host)


def _is_no_name(host: str) -> bool:
    """Whether the host is numeric, or a name that nobody can point elsewhere."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or name.endswith(".localhost") or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def is_for_this_machine(host: str, api_key: str | None) -> bool:
    """Whether a server that listens there can be asked from this machine alone, without a key."""
    try:
        return api_key is None and (host == "localhost" or ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False
