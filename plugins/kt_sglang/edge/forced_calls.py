"""Calls of tools that a request demands (`tool_choice` required, or of one tool by name), as JSON.

Trigger: a model whose parser of calls has no grammar of its own, so that SGLang writes one schema for all calls. It
puts each tool's parameters deep into that schema, where their `$ref` lead nowhere, and refuses two tools that each have
a `$defs` of the same name. Here each tool's parameters are a `$defs` of their own, and what refers to a part of them
refers to it there. And where a tool is not `strict`, its schema is a hint by OpenAI's protocol: xgrammar keeps to as
much of it as it can, and if it can keep to only a part of one, its arguments are any object, as SGLang itself has it
for models with a grammar of their own (sampling/grammars.py). Safe because a strict tool is kept to, or refused, as
before. Remove when SGLang does so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from kt_sglang.sampling.grammars import AT_LIBERTY

DEFINITIONS = "$defs"
REFERENCE = "$ref"
NO_POINTER = re.compile(r"[^\w-]", re.ASCII)
"""What cannot stand in the path of a `$ref` as it is."""
OF_NAMES = frozenset({DEFINITIONS, "definitions", "properties", "patternProperties", "dependentSchemas"})
"""Keywords whose value has schemas by the names of others."""
OF_DATA = frozenset({"enum", "const", "default", "examples"})
"""Keywords whose value is no schema."""
FORMS = frozenset({"json_schema", "json_object"})
"""Types of a response_format that say what an answer's text is."""
NONE: dict[str, Any] = {"type": "object", "properties": {}}
"""Parameters of a tool that has none."""


def around_json_constraint(
    original: Callable[..., Any], tools: Any, tool_choice: Any, parallel_tool_calls: bool = True
) -> Any:
    """AROUND hook of `get_json_schema_constraint`."""
    name = getattr(getattr(tool_choice, "function", None), "name", None)
    functions = [tool.function for tool in tools if name in (None, tool.function.name)]
    if not functions or (name is None and tool_choice != "required"):
        return original(tools, tool_choice, parallel_tool_calls)
    return calls_of(functions if name is None else functions[:1], parallel_tool_calls)


def around_chat_sampling(original: Callable[..., Any], request: Any, *others: Any, **more: Any) -> Any:
    """AROUND hook of `ChatCompletionRequest.to_sampling_params`. SGLang refuses a form of the text, such as agents send
    with each request, beside a demanded call; but such an answer has no text."""
    form, choice = request.response_format, request.tool_choice
    is_demanded = choice == "required" or not isinstance(choice, (str, type(None)))
    if getattr(form, "type", None) not in FORMS or not (is_demanded and more.get("tool_call_constraint")):
        return original(request, *others, **more)
    request.response_format = None
    try:
        return original(request, *others, **more)
    finally:
        request.response_format = form


def calls_of(functions: Iterable[Any], several: bool) -> dict[str, Any]:
    """The schema of a list of calls of any of these functions. several: whether of more than one."""
    definitions: dict[str, Any] = {}
    calls, free = [], []
    for number, function in enumerate(functions):
        place = NO_POINTER.sub("_", function.name)
        place = f"{place}_{number}" if place in definitions else place
        definitions[place] = moved(function.parameters or NONE, f"#/{DEFINITIONS}/{place}")
        calls.append(_call(function.name, place))
        free += [] if function.strict else [place]
    made: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, DEFINITIONS: definitions}
    return made | ({} if several else {"maxItems": 1}) | ({AT_LIBERTY: free} if free else {})


def moved(schema: Any, place: str) -> Any:
    """A schema, or a part of one, that is to stand at a place of a larger one."""
    if isinstance(schema, list):
        return [moved(each, place) for each in schema]
    return {key: _moved(key, part, place) for key, part in schema.items()} if isinstance(schema, dict) else schema


def _moved(key: str, part: Any, place: str) -> Any:
    if key == REFERENCE and isinstance(part, str) and part.startswith("#"):
        return place + part[1:]
    if key in OF_NAMES and isinstance(part, dict):
        return {name: moved(each, place) for name, each in part.items()}
    return part if key in OF_DATA else moved(part, place)


def _call(name: str, place: str) -> dict[str, Any]:
    fields = {
        "name": {"type": "string", "enum": [name]},
        "parameters": {REFERENCE: f"#/{DEFINITIONS}/{place}"},
    }
    return {"type": "object", "properties": fields, "required": [*fields]}
