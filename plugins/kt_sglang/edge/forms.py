"""SGLang's errors in the form of the route's protocol.

Trigger: what SGLang, its check of keys and its router say is not where clients of OpenAI, Anthropic and Ollama look, or
of another type than theirs. Safe because status and message stay, and on OpenAI's routes SGLang's own fields; but an
adapter that was unloaded after a request had named it is a 404, as it is a moment later. Remove when SGLang has the
forms of the protocols.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import orjson
from starlette.types import Message, Send

ANTHROPIC, OLLAMA = "/v1/messages", "/api/"
OPENAI = ("/v1/", "/invocations", "/tokenize", "/detokenize")
AT_FAULT, SERVER = "invalid_request_error", "server_error"
BY_STATUS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
             429: "rate_limit_error"}  # fmt: skip
"""Anthropic's types of errors; others are AT_FAULT, and from 500 on api_error."""
CODES = {401: "invalid_api_key", 404: "model_not_found"}
TOO_LONG = "context_length_exceeded"
LENGTHS = ("context length", "exceeds the maximum allowed length")
"""Words of SGLang's errors about prompts that are too long: in front of its scheduler, and in it, which keeps a few
tokens of the context for itself."""
TOLD = {"Unauthorized": "the key is missing or wrong: send it as Authorization: Bearer KEY"}
FIELD = re.compile(r"([a-z_]+)(?:: | must )")
"""How messages about a field begin."""
GONE = re.compile(r"Got LoRA adapter that has never been loaded: (.*)")
WHERE_IN_SCHEMA = "\n\nFailed validating"
"""What jsonschema appends, of several lines, to what is wrong with a tool's parameters."""
NO_CAUSE = " None"
"""What SGLang appends to messages on /v1/responses."""
Form = Callable[[dict[str, Any], int, str], dict[str, Any]]
"""(SGLang's body, status, message) → the body for a client."""


def form_of(path: str) -> Form | None:
    """What the clients of this path read; None where SGLang's own form is the right one."""
    if path.startswith(ANTHROPIC):
        return anthropic_error
    if path.startswith(OLLAMA):
        return ollama_error
    return openai_error if path.startswith(OPENAI) else None


class Errors:
    """Passes on what an application sends; an error in SGLang's form also gets that of its route's protocol."""

    def __init__(self, send: Send, form: Form) -> None:
        self._send, self._form = send, form
        self._start: Message | None = None
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_json_error(message):
            self._start = message
        elif self._start is None:
            await self._send(message)
        elif message["type"] == "http.response.body":
            self._parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                await self._finish(self._start)

    async def _finish(self, start: Message) -> None:
        status, body = formed(self._form, start["status"], b"".join(self._parts))
        kept = [(key, value) for key, value in start["headers"] if key.lower() != b"content-length"]
        await self._send({**start, "status": status, "headers": [*kept, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})


def formed(form: Form, status: int, raw: bytes) -> tuple[int, bytes]:
    """(status, body) of an error of SGLang's; unchanged if there is no message in it."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return status, raw
    message = message_of(body) if isinstance(body, dict) else None
    if message is None:
        return status, raw
    status, message = sound(status, message)
    return status, orjson.dumps(form(body, status, message))


def message_of(body: Mapping[str, Any]) -> str | None:
    """What an error says, wherever SGLang and its libraries put it."""
    error = body.get("error")
    inner = error.get("message") if isinstance(error, dict) else error
    return next((each for each in (inner, body.get("message"), body.get("detail")) if isinstance(each, str)), None)


def sound(status: int, message: str) -> tuple[int, str]:
    """Status and message without what SGLang adds, or says to itself."""
    if (gone := GONE.match(message)) is not None:
        return 404, f"model: there is no adapter named {gone[1]!r} any more. GET /v1/models lists all."
    return status, TOLD.get(message, message.partition(WHERE_IN_SCHEMA)[0].removesuffix(NO_CAUSE))


def openai_error(body: dict[str, Any], status: int, message: str) -> dict[str, Any]:
    """An added `error`; one that is there keeps its type and a code in words."""
    there = body["error"] if isinstance(body.get("error"), dict) else {}
    kind = there.get("type") or (AT_FAULT if status < 500 else SERVER)
    error = {"message": message, "type": kind, "param": there.get("param") or body.get("param"), "code": None}
    if isinstance(there.get("code"), str):
        error["code"] = there["code"]
    elif status == 401 or GONE.match(message_of(body) or ""):
        error["code"] = CODES[status]
    elif status == 400 and any(words in message for words in LENGTHS):
        error["code"] = TOO_LONG
    if error["param"] is None and status in (400, 404) and (field := FIELD.match(message)):
        error["param"] = field[1]
    return {**body, "error": error}


def anthropic_error(body: dict[str, Any], status: int, message: str) -> dict[str, Any]:
    """With a type that Anthropic has."""
    there = body["error"] if isinstance(body.get("error"), dict) else {}
    return {"type": "error", "error": {**there, "message": message, "type": anthropic_type(status)}}


def ollama_error(body: dict[str, Any], status: int, message: str) -> dict[str, Any]:
    """Ollama's clients read text."""
    return {**body, "error": message}


def anthropic_type(status: int) -> str:
    """Of an error with this status."""
    return BY_STATUS.get(status, AT_FAULT) if status < 500 or status == 501 else "api_error"


def _is_json_error(start: Message) -> bool:
    kinds = [value for key, value in start.get("headers", ()) if key.lower() == b"content-type"]
    return start["status"] >= 400 and any(kind.startswith(b"application/json") for kind in kinds)
