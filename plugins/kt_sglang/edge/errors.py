"""Our own errors in the form of the route's protocol, and one sentence that says what is wrong with a body. SGLang's
errors are in forms.py.

Trigger: SGLang answers an invalid body with pydantic's output, including paths of its own files. Safe because the
status stays. Remove when SGLang says it in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from kt_sglang.edge.forms import ANTHROPIC, AT_FAULT, OLLAMA, anthropic_type
from kt_sglang.edge.requests import Refused

LOADING = "/load_lora_adapter"
MOST_FIELDS, LONGEST = 3, 300
SAID = dict.fromkeys(("model_attributes_type", "model_type", "dataclass_type"), "expected a JSON object")
"""Kinds of pydantic's errors whose own messages are about Python."""


def answer(path: str, refused: Refused) -> JSONResponse:
    """The form of the path's protocol; on Anthropic's routes with OpenAI's fields, too, and where adapters are loaded
    SGLang's own."""
    if path == LOADING:
        return JSONResponse({"success": False, "error_message": str(refused)}, refused.status)
    error = _error(refused)
    if path.startswith(OLLAMA):
        return JSONResponse({"error": error.pop("message"), **error}, refused.status)
    if path.startswith(ANTHROPIC):
        error["type"] = anthropic_type(refused.status)
        return JSONResponse({"type": "error", "error": error}, refused.status)
    return openai_answer(refused)


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
    sent = [error for error in errors if error.get("type") != "is_instance_of"]  # alternatives that no client can send
    for error in fitting(sent):
        where = [part for part in error.get("loc", ()) if isinstance(part, str) and part != "body" and "[" not in part]
        said = SAID.get(error.get("type", ""), str(error.get("msg", "")).removeprefix("Value error, "))
        said = f"{where[-1]}: {said}" if error.get("type") == "missing" and len(where) > 1 else said
        said = f"{said}, got {error['input']!r:.40}" if _is_tag(error, "type") else said
        reasons = found.setdefault(where[0] if where else "", [])
        if said and said not in reasons:
            reasons.append(said)
    parts = [f"{name or 'the body'}: {', or '.join(reasons[:MOST_FIELDS])}" for name, reasons in found.items()]
    text = "; ".join(parts[:MOST_FIELDS]) or "the body is wrong"
    return next(iter(found), ""), text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def fitting(errors: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without what alternatives say that are not meant: messages of another role, parts of another type, a text where a
    list was sent. If none is meant, what they say about role or type."""
    live = [error for error in errors if not _below(error, _others(errors, "role"))]
    if not live:
        return [error for error in errors if _is_tag(error, "role")]
    others = _others(live, "type")
    meant = [error for error in live if not (_below(error, others) or (others and isinstance(error["input"], list)))]
    return meant or [error for error in live if _is_tag(error, "type")]


def _is_tag(error: Mapping[str, Any], field: str) -> bool:
    return error["type"] in ("literal_error", "value_error") and error["loc"][-1:] == (field,)


def _others(errors: list[Mapping[str, Any]], field: str) -> set[tuple[Any, ...]]:
    """Where the alternatives are whose `field` has another value than what was sent."""
    return {tuple(error["loc"][:-1]) for error in errors if _is_tag(error, field)}


def _below(error: Mapping[str, Any], places: set[tuple[Any, ...]]) -> bool:
    return any(tuple(error["loc"][: len(place)]) == place for place in places)
