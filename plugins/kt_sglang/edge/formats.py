"""The form that a request asks its answer to have. Pure.

Trigger: a `response_format` that is no object, or of type `json_schema` without a schema: SGLang answers 500, or names
its own variable. Safe because no such request could be answered. Remove when SGLang says what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kt_sglang.edge.requests import Refused

FIELD = "response_format"
EXAMPLE = '{"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}'


def require_form(body: Mapping[str, Any]) -> None:
    """Raise Refused for a response_format from which no grammar can be made."""
    form = body.get(FIELD)
    if form is None:
        return
    if not isinstance(form, dict):
        raise _wrong(f'expected an object, such as {{"type": "json_object"}}, but got {form!r:.40}')
    if form.get("type") != "json_schema":
        return
    inner = form.get("json_schema")
    if not isinstance(inner, dict):
        raise _wrong(f"its json_schema is {_shown(inner)}, expected an object, as in {EXAMPLE}")
    if not isinstance(schema := inner.get("schema"), dict):
        raise _wrong(f"the schema in its json_schema is {_shown(schema)}, expected an object, as in {EXAMPLE}")


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{value!r:.40}"


def _wrong(problem: str) -> Refused:
    return Refused(400, FIELD, f"{FIELD}: {problem}")
