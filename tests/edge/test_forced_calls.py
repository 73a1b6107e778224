"""Calls of tools that a request demands of a model whose calls SGLang has no grammar for: what the tools demand is kept
to, and what they need not have demanded refuses nothing. And how many calls come of several."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from launching import Running, launched

from kt_sglang.edge.forced_calls import around_json_constraint, calls_of, moved
from kt_sglang.sampling.grammars import AT_LIBERTY, around_dispatch_json, with_liberties
from kt_sglang.without_gpu import torchvision_shim

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{% for m in messages %}{{ m.content }}"
    "{% endfor %}"
)
"""Shows tools, and does not say how they are called."""
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
OTHER = {"type": "object", "properties": {"y": {"type": "boolean"}}, "required": ["y"], "additionalProperties": False}
UNIQUE = {"type": "object", "properties": {"s": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}}


def within(part: dict[str, Any], definition: dict[str, Any]) -> dict[str, Any]:
    """Parameters that refer to a definition of theirs, as pydantic and Zod write them."""
    return {"type": "object", "properties": {"p": part}, "required": ["p"], "$defs": {"Item": definition}}


POINTS = within({"$ref": "#/$defs/Item", "description": "where"}, POINT)
OTHERS = within({"$ref": "#/$defs/Item"}, OTHER)


def function(name: str, parameters: Any, strict: bool | None = None) -> Any:
    return SimpleNamespace(name=name, parameters=parameters, strict=strict)


def accepts(schema: dict[str, Any], text: str) -> bool:
    """Whether xgrammar takes a text for a whole answer of a schema's."""
    xgrammar = pytest.importorskip("xgrammar")
    vocabulary = xgrammar.TokenizerInfo([bytes([byte]) for byte in range(256)] + [b"</s>"], stop_token_ids=[256])
    grammar = xgrammar.GrammarCompiler(vocabulary).compile_json_schema(json.dumps(schema))
    matcher = xgrammar.GrammarMatcher(grammar)
    return bool(matcher.accept_string(text) and matcher.accept_token(256))


def call(name: str, parameters: Any) -> str:
    return json.dumps([{"name": name, "parameters": parameters}])


def test_parameters_refer_to_their_own_definitions() -> None:
    made = calls_of([function("a", POINTS), function("b", OTHERS)], several=True)
    assert accepts(made, call("a", {"p": {"x": 1}}))
    assert accepts(made, call("b", {"p": {"y": True}}))
    assert not accepts(made, call("a", {"p": {"y": True}}))
    assert not accepts(made, call("c", {}))


@pytest.mark.parametrize("reference", ["#/properties/a", "#/definitions/i", "#/$defs/i"])
def test_a_reference_leads_to_any_part_of_its_parameters(reference: str) -> None:
    number = {"type": "integer"}
    named = {"i": number}
    whole = {"type": "object", "properties": {"a": number, "b": {"$ref": reference}}, "required": ["a", "b"]}
    made = calls_of([function("f", whole | {"definitions": named, "$defs": named})], several=True)
    assert accepts(made, call("f", {"a": 1, "b": 2}))
    assert not accepts(made, call("f", {"a": 1, "b": "2"}))


def test_data_are_no_references() -> None:
    data = {"$ref": "#/a"}
    schema = {"properties": {"default": {"default": data}, "$ref": {"enum": [data]}}, "items": [{"$ref": "#"}, True]}
    assert moved(schema, "#/b") == {**schema, "items": [{"$ref": "#/b"}, True]}


def test_names_that_are_no_pointers_and_those_of_two_tools_stay_apart() -> None:
    made = calls_of([function("a.b", POINT), function("a~b", OTHER), function("none", None)], several=False)
    assert list(made["$defs"]) == ["a_b", "a_b_1", "none"]
    assert accepts(made, call("a~b", {"y": True}))
    assert not accepts(made, call("a.b", {"y": True}))
    assert accepts(made, call("none", {}))
    assert made["maxItems"] == 1


def test_a_tool_that_is_named_is_the_only_one() -> None:
    tools = [SimpleNamespace(function=function(name, POINT)) for name in ("a", "b")]
    chosen = SimpleNamespace(function=SimpleNamespace(name="b"))
    assert list(around_json_constraint(pytest.fail, tools, chosen)["$defs"]) == ["b"]
    assert list(around_json_constraint(pytest.fail, tools, "required")["$defs"]) == ["a", "b"]
    nobody = SimpleNamespace(function=SimpleNamespace(name="c"))
    for choice in (nobody, "auto"):
        assert around_json_constraint(lambda *_: "SGLang's", tools, choice) == "SGLang's"


def test_only_tools_that_are_not_strict_are_at_liberty_and_only_what_cannot_be_kept_to() -> None:
    made = calls_of([function("a", UNIQUE), function("b", POINT), function("c", UNIQUE, strict=True)], several=True)
    assert made[AT_LIBERTY] == ["a", "b"]
    freed = with_liberties(made, lambda part: "uniqueItems" not in json.dumps(part))
    assert freed["$defs"] == {"a": {"type": "object"}, "b": POINT, "c": UNIQUE}
    assert with_liberties({"$defs": 5, AT_LIBERTY: ["a"]}, bool) == {"$defs": 5, AT_LIBERTY: ["a"]}
    assert with_liberties({"$defs": {}, AT_LIBERTY: [3, "x"]}, bool)["$defs"] == {}


def test_a_schema_that_can_be_kept_to_and_one_of_a_client_stay_as_they_are() -> None:
    torchvision_shim.install_if_needed()
    from sglang.srt.constrained.base_grammar_backend import InvalidGrammarObject

    asked: list[str] = []
    invalid = InvalidGrammarObject("no")

    def dispatch(backend: Any, schema: str) -> Any:
        asked.append(schema)
        return invalid if "uniqueItems" in schema else "grammar"

    assert around_dispatch_json(dispatch, None, json.dumps({AT_LIBERTY: ["a"]})) == "grammar"
    assert around_dispatch_json(dispatch, None, json.dumps(UNIQUE)) is invalid
    assert len(asked) == 2
    freed = calls_of([function("a", UNIQUE)], several=True)
    assert around_dispatch_json(dispatch, None, json.dumps(freed)) == "grammar"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("runs")
    (folder / "tools.jinja").write_text(TEMPLATE)
    words = f"server.extra_args=[--chat-template,{folder / 'tools.jinja'},--tool-call-parser,pythonic]"
    with launched(words, runs=folder) as running:
        yield running


NAMED = {"type": "function", "function": {"name": "f"}}
DEMANDED: list[dict[str, Any]] = [
    POINTS,
    UNIQUE,
    {"type": "object", "properties": {"u": {"type": "string", "format": "uri", "minLength": 1}}},
    {"type": "object", "properties": {"n": {"type": "integer", "format": "uint32", "minimum": 0}}},
    {"type": "object", "properties": {"h": {"type": "object", "propertyNames": {"minLength": 1}}}},
    {"type": "object", "properties": {"a": {"type": "string"}, "b": {"$ref": "#/properties/a"}}},
    {"type": "object", "properties": {"a": {"type": "string"}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a", "gone"]},
    {"allOf": [{"type": "object", "properties": {"a": {}}}, {"type": "object", "properties": {"b": {}}}]},
]
"""What MCP servers, Zod and pydantic describe tools by."""


@pytest.mark.server
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("parameters", DEMANDED, ids=str)
def test_tools_are_called_whatever_describes_them(served: Running, parameters: dict[str, Any], choice: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
    answer = served.client.post("/v1/chat/completions", json={**asked, "tools": tools, "tool_choice": choice})
    assert answer.status_code == 200, answer.text


@pytest.mark.server
def test_a_strict_tool_that_cannot_be_kept_to_is_refused(served: Running) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": UNIQUE, "strict": True}}]
    asked = {"messages": [{"role": "user", "content": "Hello"}], "tools": tools, "tool_choice": "required"}
    answer = served.client.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 400
    assert "uniqueItems would be ignored, at #/$defs/f/properties/s" in answer.text


TWO_CALLS = r"\[f\(x=1\), f\(x=2\)\]"
"""The regular expression of two calls, as models of that parser write them."""
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
NUMBERS = {None: [1, 2], True: [1, 2], False: [1]}
"""What parallel_tool_calls says → the arguments that come."""


@pytest.mark.server
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("parallel", NUMBERS)
def test_only_the_first_call_comes_if_one_was_asked_for(served: Running, parallel: bool | None, streams: bool) -> None:
    chat: Any = openai.OpenAI(base_url=f"{served.client.base_url}/v1", api_key="none").chat.completions
    asked: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "stream": streams}
    asked |= {"tools": [{"type": "function", "function": FUNCTION}], "extra_body": {"regex": TWO_CALLS}}
    made = chat.create(**asked, **({} if parallel is None else {"parallel_tool_calls": parallel}))
    choices = [choice for part in made for choice in part.choices] if streams else made.choices
    messages = [choice.delta if streams else choice.message for choice in choices]
    texts: dict[int, str] = {}
    for call in (call for message in messages for call in message.tool_calls or ()):
        texts[call.index] = texts.get(call.index, "") + (call.function.arguments or "")
    assert [json.loads(text)["x"] for text in texts.values()] == NUMBERS[parallel]
    assert choices[-1].finish_reason == "tool_calls"
    assert not any(message.content for message in messages)


@pytest.mark.server
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_form_of_the_text_goes_with_a_demanded_call(served: Running, choice: Any) -> None:
    """Agents send their output's form with each request, also with those that demand a tool."""
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    exact = {"type": "object", "properties": {"x": {"enum": [1]}}, "required": ["x"], "additionalProperties": False}
    asked |= {"tools": [{"type": "function", "function": {"name": "f", "parameters": exact}}], "tool_choice": choice}
    for form in ({"type": "json_schema", "json_schema": {"name": "o", "schema": OTHER}}, {"type": "json_object"}):
        answer = served.client.post("/v1/chat/completions", json={**asked, "response_format": form})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"].startswith("["), "the beginning of a list of calls"
    refused = served.client.post("/v1/chat/completions", json={**asked, "regex": "a"})
    assert refused.status_code == 400
    assert "cannot both be honored" in refused.text
