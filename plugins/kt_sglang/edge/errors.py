"""Errors in the form of the route's protocol: one sentence that says what is wrong with a request.

Trigger: SGLang answers an invalid body with pydantic's output, including paths of its own files, and on OpenAI's routes
its errors are not where OpenAI's clients look. Safe because status and message stay, along with SGLang's own fields.
Remove when SGLang has OpenAI's form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Message, Send

from kt_sglang.edge.requests import Refused

LOADING = "/load_lora_adapter"
ANTHROPIC = "/v1/messages"
OPENAI = ("/v1/", "/invocations", "/tokenize", "/detokenize")
AT_FAULT, SERVER = "invalid_request_error", "server_error"
MOST_FIELDS, LONGEST = 3, 300
SAID = dict.fromkeys(("model_attributes_type", "model_type", "dataclass_type"), "expected a JSON object")
"""Kinds of pydantic's errors whose own messages are about Python."""


def is_openai(path: str) -> bool:
    """Whether OpenAI's clients use this path."""
    return path.startswith(OPENAI) and not path.startswith(ANTHROPIC)


def answer(path: str, refused: Refused) -> JSONResponse:
    """OpenAI's form; on Anthropic's routes also Anthropic's, and where adapters are loaded also SGLang's own."""
    if path == LOADING:
        return JSONResponse({"success": False, "error_message": str(refused)}, refused.status)
    if not path.startswith(ANTHROPIC):
        return openai_answer(refused)
    error = _error(refused)
    error["type"] = "not_found_error" if refused.status == 404 else AT_FAULT
    return JSONResponse({"type": "error", "error": error}, refused.status)


def openai_answer(refused: Refused) -> JSONResponse:
    """OpenAI's form, whatever the route."""
    return JSONResponse({"error": _error(refused)}, refused.status)


def _error(refused: Refused) -> dict[str, Any]:
    return {"message": str(refused), "type": AT_FAULT, "param": refused.param or None, "code": refused.code}


async def answer_invalid(request: Request, invalid: Any) -> JSONResponse:
    """Replaces SGLang's handler of RequestValidationError."""
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    return answer(path, Refused(400, *sentence(invalid.errors())))


def sentence(errors: Iterable[Mapping[str, Any]]) -> tuple[str, str]:
    """(the invalid field or "", what is wrong with the fields) of pydantic's errors."""
    found: dict[str, list[str]] = {}
    for error in errors:
        if error.get("type") == "is_instance_of":  # an alternative that no client can send
            continue
        where = [part for part in error.get("loc", ()) if isinstance(part, str) and part != "body" and "[" not in part]
        said = SAID.get(error.get("type", ""), str(error.get("msg", "")).removeprefix("Value error, "))
        reasons = found.setdefault(where[0] if where else "", [])
        if said and said not in reasons:
            reasons.append(said)
    parts = [f"{name or 'the body'}: {', or '.join(reasons[:MOST_FIELDS])}" for name, reasons in found.items()]
    text = "; ".join(parts[:MOST_FIELDS]) or "the body is wrong"
    return next(iter(found), ""), text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


class OpenAIErrors:
    """Passes on what an application sends; an error in SGLang's form also gets OpenAI's."""

    def __init__(self, send: Send) -> None:
        self._send = send
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
        body = with_openai_error(b"".join(self._parts), start["status"])
        kept = [(key, value) for key, value in start["headers"] if key.lower() != b"content-length"]
        await self._send({**start, "headers": [*kept, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})


def with_openai_error(raw: bytes, status: int) -> bytes:
    """SGLang's {"object": "error", "message": …} with an added `error`; anything else unchanged."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return raw
    if not isinstance(body, dict) or body.get("object") != "error" or "error" in body:
        return raw
    kind = AT_FAULT if status < 500 else SERVER
    error = {"message": body.get("message"), "type": kind, "param": body.get("param"), "code": None}
    return orjson.dumps({**body, "error": error})


def _is_json_error(start: Message) -> bool:
    kinds = [value for key, value in start.get("headers", ()) if key.lower() == b"content-type"]
    return start["status"] >= 400 and any(kind.startswith(b"application/json") for kind in kinds)
