"""Asks a server every operation of its /openapi.json: with no body, with an empty one, and with the least that the
schema asks for.

Nothing is left out. What would end or change a server of ours is refused by it, and that is looked at, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

REFUSAL = "not_offered"
PATH_VALUES = {"model": "demo", "response_id": "resp_none"}
FIELD_VALUES = {"forward_sleep_time": None}
"""Where the least value would slow the server for good."""


@dataclass(frozen=True)
class RequestHandler:
    """One request and its answer."""

    method: str
    path: str
    body: Any
    status: int
    text: str

    @property
    def is_refusal(self) -> bool:
        """Whether the server says that it does not offer this, and why."""
        return self.status == httpx.codes.NOT_IMPLEMENTED and REFUSAL in self.text and "is not offered: " in self.text


def ask_all(client: httpx.Client) -> list[RequestHandler]:
    """In the order in which the document has them."""
    document = client.get("/openapi.json").raise_for_status().json()
    schemas = document["components"]["schemas"]
    asked = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parameters = {
                each["name"]: least(each["schema"], schemas)
                for each in operation.get("parameters", [])
                if each["in"] == "query" and each.get("required")
            }
            where = path.format(**PATH_VALUES)
            for options in _bodies(operation.get("requestBody", {}).get("content", {}), schemas):
                answer = client.request(method.upper(), where, params=parameters, **options)
                asked.append(RequestHandler(method.upper(), path, options, answer.status_code, answer.text))
    return asked


def _bodies(content: dict[str, Any], schemas: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {}
    yield {"json": {}}
    if "application/json" in content:
        yield {"json": least(content["application/json"]["schema"], schemas)}
    if "multipart/form-data" in content:
        yield {"files": {"file": ("sound.wav", b"RIFF")}, "data": {"model": "demo"}}


def least(schema: dict[str, Any], schemas: dict[str, Any], field: str = "") -> Any:
    """The smallest value that a schema allows: defaults, first choices, required fields only."""
    if "$ref" in schema:
        return least(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    if field in FIELD_VALUES:
        return FIELD_VALUES[field]
    if schema.get("default") is not None:
        return schema["default"]
    if "const" in schema or "enum" in schema:
        return schema.get("const") or schema["enum"][0]
    if choices := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        return least(choices[0], schemas)
    if schema.get("type") == "array":
        return [least(schema["items"], schemas)] * max(1, schema.get("minItems", 1))
    if schema.get("type") == "object":
        return {name: least(schema["properties"][name], schemas, name) for name in schema.get("required", [])}
    return {"string": "a", "integer": 1, "number": 1.0, "boolean": False}.get(schema.get("type", ""))
