"""The HTTP port that loads adapters into all servers behind a router at once (server.adapters_port), with the routes of
a single server: /load_lora_adapter and /unload_lora_adapter; GET /adapters lists which server has which. It requires
the servers' key, and refuses web pages. Imported only when it is served.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from kt_launch.cluster.adapters import Change, Worker, load, read_all, unload
from kt_launch.watching.client import LOADING, UNLOADING, Keys, url_of
from kt_launch.watching.own_port import OwnHandler, OwnServer, answering, in_thread
from kt_model.errors import LaunchError
from kt_model.printable import say

LIST = "/adapters"
LARGEST_BODY = 1 << 16


class AdaptersPort(OwnServer):
    """For servers that share the same keys."""

    def __init__(self, host: str, port: int, workers: Sequence[Worker], keys: Keys) -> None:
        self.workers, self.keys = workers, keys
        self.changing = threading.Lock()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), RequestHandler)


class RequestHandler(OwnHandler):
    """One request."""

    server: AdaptersPort

    def do_GET(self) -> None:
        if self.path != LIST:
            self._refuse(404, f"there is {LIST}, {LOADING} and {UNLOADING} here, and nothing else")
        elif self._may(self.server.keys.key, self.server.keys.admin_key):
            self._try(lambda: {"servers": read_all(self.server.workers)})

    def do_POST(self) -> None:
        changes = {LOADING: self._load, UNLOADING: self._unload}
        if self.path not in changes:
            self._refuse(404, f"there is {LIST}, {LOADING} and {UNLOADING} here, and nothing else")
        elif self._may(self.server.keys.admin_key or self.server.keys.key):
            asked = self._read()
            if asked is not None:
                self._try(lambda: _said(self._change(changes[self.path], asked)))

    def _change(self, change: Callable[[dict[str, Any]], Change], asked: dict[str, Any]) -> Change:
        with self.server.changing:
            return change(asked)

    def _load(self, asked: dict[str, Any]) -> Change:
        return load(self.server.workers, _text(asked, "lora_name"), _text(asked, "lora_path"))

    def _unload(self, asked: dict[str, Any]) -> Change:
        return unload(self.server.workers, _text(asked, "lora_name"))

    def _may(self, *keys: str | None) -> bool:
        """Whether the request comes from no web page, and carries one of the keys if there are any."""
        if self.headers.get("Origin") or self.headers.get("Sec-Fetch-Site", "none") != "none":
            self._refuse(403, "requests from web pages are not accepted here")
            return False
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        known = [key.encode() for key in keys if key]
        if known and not any(hmac.compare_digest(given, key) for key in known):
            self._refuse(401, "a key is needed: server.admin_key, or server.api_key where there is none")
            return False
        return True

    def _read(self) -> dict[str, Any] | None:
        with contextlib.suppress(ValueError, RecursionError):
            asked = json.loads(self.read_body(LARGEST_BODY) or b"")
            if isinstance(asked, dict):
                return asked
        self._refuse(400, f"a JSON object of at most {LARGEST_BODY} bytes is expected")
        return None

    def _try(self, answer: Callable[[], dict[str, Any]]) -> None:
        try:
            content = answer()
        except LaunchError as failure:
            self._refuse(400, str(failure))
        else:
            self._give(200 if content.get("success", True) else 400, content)

    def _refuse(self, status: int, message: str) -> None:
        self._give(status, {"success": False, "error_message": message})

    def _give(self, status: int, content: dict[str, Any]) -> None:
        self.give(json.dumps(content).encode(), "application/json", {}, status)


def _said(change: Change) -> dict[str, Any]:
    """In SGLang's form, plus the results by server."""
    known = asdict(change)
    first = next(iter(change.found.values()), {})
    return {
        "success": change.success,
        "error_message": change.message,
        "servers": list(known["kept"]),
        "refused": known["refused"],
        "adapter": first.get("adapter") if change.success else None,
    }


def _text(asked: dict[str, Any], name: str) -> str:
    value = asked.get(name)
    if not isinstance(value, str) or not value:
        raise LaunchError(name, f"got {value!r}, but a text is expected", "Name the adapter, and its folder.")
    return value


@contextlib.contextmanager
def served(host: str, port: int, workers: Sequence[Worker], keys: Keys) -> Iterator[str]:
    """Serves it within the block and prints its address; port 0 takes a free one. Raises LaunchError if the port cannot
    be used."""
    key = "server.adapters_port"
    with answering(key, host, port, lambda: in_thread(AdaptersPort(host, port, workers, keys))) as server:
        url = url_of(host, server.server_port)
        say(f"adapters: {url}")
        yield url
