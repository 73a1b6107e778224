"""The middleware in front of SGLang's routes: resolves names, answers blocked requests, and lists the models.

Pure ASGI and innermost: SGLang's key check, CORS and decompression run before it, and answers pass through unchanged,
including streamed ones.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kt_model.contract import PROVEN_ROUTE, READY, START, START_HEADER
from kt_sglang.edge import errors, forms, models, run_state
from kt_sglang.edge.adapters import ASKED, Served
from kt_sglang.edge.blocked_routes import ADMIN_ONLY
from kt_sglang.edge.contract import require_contract
from kt_sglang.edge.formats import require_form
from kt_sglang.edge.lengths import require_fitting
from kt_sglang.edge.one_call import ONE_CALL, wants_one
from kt_sglang.edge.requests import Refused, Route, require_offered, require_plain_name, understand
from kt_sglang.edge.scoring import NO_TOKEN, with_a_token
from kt_sglang.edge.unheard import Unheard, require_heard

MODELS, READY_ROUTE = "/v1/models", "/ready"
MOST_BYTES = 64 << 20
"""Largest body in bytes; larger ones would use up memory and time at the expense of other clients."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Paths:
    """What is known about SGLang's paths, by path."""

    names: Mapping[str, Route]
    refused: Mapping[str, str]
    at_fault: Mapping[str, tuple[type[Exception], ...]]
    fields: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    unheard: Mapping[str, tuple[Unheard, ...]] = field(default_factory=dict)
    admin: frozenset[str] = frozenset()
    """Paths for administrators, on a server without an admin key."""


class Edge:
    """read_served: returns what is served at this moment, since adapters are loaded and unloaded."""

    def __init__(self, app: ASGIApp, paths: Paths, read_served: Callable[[], Served]) -> None:
        self._app, self._paths, self._read_served = app, paths, read_served
        self._start = os.environ.get(START, "").encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # realtime audio, unsupported here; SGLang requires no key
            await send({"type": "websocket.close", "code": 1008, "reason": "not offered"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        signed = self._signed(send)
        try:
            told = forms.Errors(signed, form) if (form := forms.form_of(path)) else signed
            await self._answer(path, scope, _bounded(receive), told)
        except Refused as refused:
            await errors.answer(path, refused)(scope, receive, signed)
        except ClientLeft:
            log.info("%s: the client disconnected while sending its request", path)

    def _signed(self, send: Send) -> Send:
        """Adds the number of this start to answers."""

        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (START_HEADER.encode(), self._start)]}
            await send(message)

        return signed

    async def _answer(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if path in self._paths.refused:
            raise Refused(501, "", f"{path} is not offered: {self._paths.refused[path]}.", "not_offered")
        if path in self._paths.admin:
            raise Refused(403, "", f"{path} is off: {ADMIN_ONLY}.", "no_admin_key")
        if path == READY_ROUTE and run_state.state() not in (None, READY):
            await JSONResponse({"state": run_state.state()}, 503)(scope, receive, send)
        elif scope["method"] == "GET" and (path == MODELS or path.startswith(f"{MODELS}/")):
            answer = models.answer(path.removeprefix(MODELS).removeprefix("/"), self._read_served())
            await JSONResponse(answer)(scope, receive, send)
        elif path == PROVEN_ROUTE and (found := run_state.state()) is not None:
            await JSONResponse({"proven": found == READY}, 200 if found == READY else 503)(scope, receive, send)
        elif scope["method"] in ("POST", "PUT") and path in self._paths.names:
            await self._ask(path, scope, receive, send)
        elif path == errors.LOADING or path in self._paths.fields:
            raw = await _read(receive)
            if (body := read_object(raw)) is not None:
                require_plain_name(body)
                require_offered(path, body, self._paths.fields.get(path, {}))
            await self._pass(path, scope, _replay(raw, receive), send)
        else:
            await self._pass(path, scope, receive, send)

    async def _ask(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """SGLang's route, with the names in its body resolved."""
        raw = await _read(receive)
        asked, no_token, one_call = None, False, False
        if (body := read_object(raw)) is not None:
            route, served = self._paths.names[path], self._read_served()
            require_fitting(body, served.context_length)
            for part in (body, body.get(route.inside) if route.inside else None):
                require_offered(path, part, self._paths.fields.get(path, {}))
            require_heard(path, body, self._paths.unheard.get(path, ()))
            require_form(body)
            understood = understand(route, body, served.names)
            asked, sent, one_call = understood.asked, understood.body, wants_one(body)
            if route.inside:
                require_contract(route.inside, sent.get(route.inside))
            if route.scores:
                sent, no_token = with_a_token(sent)
            raw = raw if sent == body else orjson.dumps(sent)
        tokens = ASKED.set(asked), NO_TOKEN.set(no_token), ONE_CALL.set(one_call)
        try:
            await self._pass(path, _as_json(_with_length(scope, len(raw)), path), _replay(raw, receive), send)
        finally:
            ASKED.reset(tokens[0])
            NO_TOKEN.reset(tokens[1])
            ONE_CALL.reset(tokens[2])

    async def _pass(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """SGLang's route unchanged, except that certain exceptions mean an invalid request."""
        begun = False

        async def note(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, note)
        except self._paths.at_fault.get(path, ()) as failure:
            if begun:
                raise
            log.info("%s: %s", path, failure)
            raise Refused(400, "", f"{path}: {failure}") from failure


class ClientLeft(Exception):
    """The client disconnected before its body was complete."""


async def _read(receive: Receive) -> bytes:
    """The whole body. Raises ClientLeft."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def read_object(raw: bytes) -> dict[str, Any] | None:
    """The JSON object of a body; None for an empty body, which SGLang refuses itself where one is needed. Raises
    Refused for anything else: unparsed content would be passed on unchecked, since SGLang accepts more than JSON."""
    if not raw.strip():
        return None
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as failure:
        raise Refused(400, "", f"the body is not JSON: {failure}") from failure
    if not isinstance(body, dict):
        raise Refused(400, "", f"the body is {shown(body)}, expected a JSON object")
    return body


def shown(value: Any) -> str:
    """How JSON would begin this value."""
    text = orjson.dumps(value).decode()
    return text if len(text) <= 20 else f"{text[:20]}…"


def _bounded(receive: Receive) -> Receive:
    """A request's body messages, up to MOST_BYTES in total. Raises Refused."""
    received = 0

    async def bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MOST_BYTES:
            raise Refused(413, "", f"the body has more than {MOST_BYTES >> 20} MiB")
        return message

    return bounded


def _replay(raw: bytes, receive: Receive) -> Receive:
    """Replays the body; afterwards the client's own messages, since SGLang waits for its disconnect."""
    waiting = [{"type": "http.request", "body": raw, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _with_length(scope: Scope, length: int) -> Scope:
    headers = [(key, str(length).encode() if key == b"content-length" else value) for key, value in scope["headers"]]
    return {**scope, "headers": headers}


def _as_json(scope: Scope, path: str) -> Scope:
    """Ollama takes a body for JSON whatever its Content-Type; that of `curl -d` is a form's, some clients send none."""
    if not path.startswith(forms.OLLAMA):
        return scope
    kept = [(key, value) for key, value in scope["headers"] if key != b"content-type"]
    return {**scope, "headers": [*kept, (b"content-type", b"application/json")]}
