"""Keys that SGLang's check cannot read, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from kt_sglang.edge import forms

KEY, BEARER = b"x-api-key", b"authorization"


def around_decide_request_auth(original: Callable[..., Any], **asked: Any) -> Any:
    """AROUND hook of `decide_request_auth`: a header that is not ASCII counts as none.

    Trigger: SGLang compares keys as text by `secrets.compare_digest`, which raises TypeError for other letters: anybody
    could fill the log with tracebacks, and got 500. Safe because keys in headers are ASCII. Remove when SGLang compares
    bytes.
    """
    header = asked["authorization_header"]
    return original(**asked | {"authorization_header": header if header and header.isascii() else None})


def after_add_api_key_middleware(result: None, app: Any, **keys: Any) -> None:
    """AFTER hook of `add_api_key_middleware`."""
    app.add_middleware(Keys)


class Keys:
    """In front of SGLang's check: a key in Anthropic's header is one, and who has none is told so in the form of the
    route's protocol.

    Trigger: SGLang reads the header Authorization only, which Anthropic's clients send for some kinds of keys. Safe
    because it is compared with the same key, and Authorization goes first. Remove when SGLang reads it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            form = forms.form_of(scope["path"].removeprefix(scope.get("root_path", "")))
            scope, send = _with_bearer(scope), forms.Errors(send, form) if form else send
        await self._app(scope, receive, send)


def _with_bearer(scope: Scope) -> Scope:
    headers = dict(scope["headers"])
    if BEARER in headers or KEY not in headers:
        return scope
    return {**scope, "headers": [*scope["headers"], (BEARER, b"Bearer " + headers[KEY])]}
