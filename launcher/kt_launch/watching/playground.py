"""The page at /playground: base and adapters answer side by side. The launcher serves it on a loopback port of its own
(server.playground_port), and forwards questions to the server with its own key.

The page never sees that key. It sends a token from the address that the launcher printed (after #, which browsers do
not send). The token in a header, and the check that Host and Origin are this address, keep out other users of this
machine, other pages, and names that resolve to 127.0.0.1 (DNS rebinding). Imported only when the page is served.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from kt_launch.machine.host import LOOPBACK
from kt_launch.runs.state import RunStateWriter
from kt_launch.watching.client import connect
from kt_launch.watching.own_port import OwnHandler, OwnServer, answering, in_thread
from kt_model.plan import LaunchPlan

PAGE, IDS, CHAT = "/playground", "/playground/ids", "/playground/chat"
UPSTREAM = {IDS: "/v1/models", CHAT: "/v1/chat/completions"}
TOKEN_HEADER = "X-Playground-Token"
PASSED_ON = ("model", "messages", "max_tokens", "temperature")
"""Fields of a question that are forwarded; the page may not set others."""
LARGEST_QUESTION = 1 << 20
ANSWER_S = 600.0
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
FILE = Path(__file__).with_name("playground.html")


@functools.cache
def read_page() -> tuple[bytes, str]:
    """The page, and a policy that allows its own script and style, requests to this address, and nothing else."""
    text = FILE.read_text(encoding="utf-8")
    script, style = (_digest(re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[0]) for tag in ("script", "style"))
    rules = (
        *("default-src 'none'", f"script-src {script}", f"style-src {style}", "connect-src 'self'", "img-src data:"),
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    )
    return text.encode(), "; ".join(rules)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class Playground(OwnServer):
    """One server's page."""

    def __init__(self, port: int, client: httpx.Client) -> None:
        self.client = client
        self.token = secrets.token_urlsafe(24)
        super().__init__((LOOPBACK, port), RequestHandler)
        self.hosts = {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}

    @property
    def url(self) -> str:
        """Including the token."""
        return f"http://{LOOPBACK}:{self.server_port}{PAGE}#{self.token}"


class RequestHandler(OwnHandler):
    """One request, from the page or from elsewhere."""

    server: Playground

    def do_GET(self) -> None:
        if not self._is_of_here():
            return
        if self.path == PAGE:
            page, policy = read_page()
            self.give(page, "text/html; charset=utf-8", {**HEADERS, "Content-Security-Policy": policy})
        elif self.path == IDS:
            if self._has_token():
                self._pass_on("GET", IDS, None)
        else:
            self._refuse(404, "there is /playground here, and nothing else")

    def do_POST(self) -> None:
        if not self._is_of_here() or not self._has_token():
            return
        if self.path != CHAT:
            self._refuse(404, "there is /playground here, and nothing else")
            return
        question = self._read_question()
        if question is not None:
            self._pass_on("POST", CHAT, question)

    def _is_of_here(self) -> bool:
        """Whether the browser uses this server's own address, and the request comes from no other page."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host in self.server.hosts and origin in (None, f"http://{host}"):
            return True
        self._refuse(403, "this page answers to its own address only")
        return False

    def _has_token(self) -> bool:
        given = self.headers.get(TOKEN_HEADER, "")
        if hmac.compare_digest(given.encode(), self.server.token.encode()):
            return True
        self._refuse(401, "open the address that kt-launch printed: the part after # is missing or of an earlier start")
        return False

    def _read_question(self) -> dict[str, Any] | None:
        content = self.read_body(LARGEST_QUESTION)
        if content is None:
            self._refuse(413, f"a question of at most {LARGEST_QUESTION} bytes is expected")
            return None
        try:
            asked = json.loads(content)
            question = {name: asked[name] for name in PASSED_ON if name in asked}
        except (ValueError, TypeError, RecursionError):
            self._refuse(400, "a JSON object is expected")
            return None
        return {**question, "stream": True, "stream_options": {"include_usage": True}}

    def _pass_on(self, method: str, path: str, content: dict[str, Any] | None) -> None:
        """Streams the server's answer as it arrives; if the browser disconnects, the request to the server ends too."""
        try:
            with self.server.client.stream(method, UPSTREAM[path], json=content) as answer:
                kind = answer.headers.get("Content-Type", "application/json")
                self.begin(answer.status_code, {"Content-Type": kind, **HEADERS})
                for piece in answer.iter_bytes():
                    self.wfile.write(piece)
                    self.wfile.flush()
        except httpx.HTTPError as failure:
            with contextlib.suppress(OSError):
                self._refuse(502, f"the server does not answer: {failure}")

    def _refuse(self, status: int, message: str) -> None:
        self.give(json.dumps({"error": {"message": message}}).encode(), "application/json", HEADERS, status)


@contextlib.contextmanager
def served(plan: LaunchPlan, state_writer: RunStateWriter, port: int) -> Iterator[None]:
    """Serves the page within the block; port 0 takes a free one. Raises LaunchError if the port cannot be used."""
    with connect(plan, ANSWER_S) as client:
        key = "server.playground_port"
        with answering(key, LOOPBACK, port, lambda: in_thread(Playground(port, client))) as server:
            state_writer.serves_playground(server.url)
            yield
