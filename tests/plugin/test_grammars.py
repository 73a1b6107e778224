"""What a client is told of a grammar that cannot be compiled; tests/edge/test_served.py shows it on a server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kt_sglang.sampling.grammars import around_validate_schema, passed_over, sentence

SAID: list[tuple[str, str]] = [
    (
        'Failed to compile json grammar: [02:07:23] /project/cpp/json_schema_converter.cc:4175: Unsupported type "x"\n',
        'json_schema: no grammar can be made of it: Unsupported type "x".',
    ),
    (
        "Failed to compile structural_tag grammar: [02:07:23] /project/cpp/grammar_compiler.cc:1207: Check failed: "
        "(std::holds_alternative<Grammar>(result)) is false: Invalid structural tag error: no triggers\n",
        "structural_tag: no grammar can be made of it: Invalid structural tag error: no triggers.",
    ),
    (
        "Failed to compile json grammar: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "json_schema: no grammar can be made of it: it is not JSON (line 1 column 2).",
    ),
    (
        "Failed to compile json grammar: JSON Schema at #/properties/a is not supported by xgrammar: keyword(s) not, "
        "if would be ignored",
        "json_schema: no grammar can be made of it: not, if would be ignored, at #/properties/a.",
    ),
    (
        "Failed to compile structural_tag grammar: Grammar compilation failed: 'begin'",
        "structural_tag: no grammar can be made of it: it does not have the form that it should have (at 'begin').",
    ),
    (
        "Failed to compile json grammar: Grammar compilation failed: maximum recursion depth exceeded while decoding",
        "json_schema: no grammar can be made of it: it is nested too deeply.",
    ),
    (
        "Failed to compile full_assistant_ebnf grammar: [02:07:23] /project/cpp/grammar_parser.cc:8: EBNF\nerror",
        "ebnf: no grammar can be made of it: EBNF error.",
    ),
    ("Aborted by AbortReq.", "Aborted by AbortReq."),
]


@pytest.mark.parametrize(("message", "said"), SAID, ids=[said[:60] for _, said in SAID])
def test_what_sglang_says_becomes_a_sentence(message: str, said: str) -> None:
    assert sentence(message) == said


def test_a_long_reason_is_cut() -> None:
    assert len(sentence(f"Failed to compile regex grammar: {'x' * 9999}")) < 400


PARTS: list[tuple[dict[str, Any], list[str]]] = [
    ({"allOf": [{}, {}]}, ["allOf of 2 schemas cannot be kept to; write them as one"]),
    ({"allOf": [{"type": "string"}]}, []),
    ({"anyOf": []}, ["anyOf has no schema"]),
    ({"$ref": "http://x/y"}, ["$ref 'http://x/y' cannot be followed, only one within the schema, as '#/$defs/name'"]),
    ({"$ref": "#/$defs/a"}, []),
    ({"$ref": "#"}, []),
    ({"required": ["a"], "properties": {"a": {}}}, []),
    ({"required": ["a", "b"], "properties": {"a": {}}}, ["required names 'b', which is not in properties"]),
    ({"required": ["a"]}, ["required names 'a', which is not in properties"]),
    ({"required": 5, "properties": []}, []),
    ({"anyOf": [{}], "maxLength": 3}, ["maxLength beside anyOf cannot be kept to; write them as one"]),
    ({"$ref": "#/a", "oneOf": [{}]}, ["oneOf beside $ref cannot be kept to; write them as one"]),
    ({"properties": {"a": {}}, "allOf": [{}]}, ["properties beside allOf cannot be kept to; write them as one"]),
    ({"anyOf": [{}], "type": "object", "title": "A", "default": None, "description": "b", "$defs": {}}, []),
    ({"maxLength": 3}, ["maxLength without a type cannot be kept to"]),
    ({"maxLength": 3, "type": "string"}, []),
    ({"maxLength": 3, "enum": ["a"]}, []),
]


@pytest.mark.parametrize(("part", "problems"), PARTS, ids=str)
def test_what_xgrammar_passes_over_is_known(part: dict[str, Any], problems: list[str]) -> None:
    assert list(passed_over(part)) == problems


def test_parts_of_a_schema_are_looked_at_and_values_are_not() -> None:
    from sglang.srt.constrained.json_schema_validation import UnsupportedJSONSchemaFeature

    around_validate_schema(lambda _: None, {"const": {"anyOf": []}, "properties": {"anyOf": {"type": "string"}}})
    with pytest.raises(UnsupportedJSONSchemaFeature, match="anyOf has no schema, at #/properties/a/items"):
        around_validate_schema(lambda _: None, {"properties": {"a": {"items": {"anyOf": []}}}})


def accepts(whole: dict[str, Any], text: str) -> bool:
    """Whether xgrammar takes a text for one that a schema allows."""
    xgrammar = pytest.importorskip("xgrammar")
    vocabulary = xgrammar.TokenizerInfo([bytes([byte]) for byte in range(256)] + [b"</s>"], stop_token_ids=[256])
    grammar = xgrammar.GrammarCompiler(vocabulary).compile_json_schema(json.dumps(whole))
    return bool(xgrammar.GrammarMatcher(grammar).accept_string(text))


@pytest.mark.parametrize("names", [{"minLength": 2}, {"pattern": "^a+$"}, {"type": "string", "minLength": 2}], ids=str)
def test_names_of_properties_are_texts_without_a_type(names: dict[str, Any]) -> None:
    """As Zod writes records; xgrammar keeps to it."""
    whole = {"type": "object", "propertyNames": names, "additionalProperties": {"type": "integer"}}
    around_validate_schema(lambda _: None, whole)
    assert accepts(whole, '{"aa": 1}')
    assert not accepts(whole, '{"b": 1}')


@pytest.mark.parametrize(
    ("whole", "wrong"),
    [
        ({"type": "object", "properties": {"a": {"type": "integer"}}, "anyOf": [{"type": "string"}]}, '"x"'),
        ({"$defs": {"i": {"type": "integer"}}, "$ref": "#/$defs/i", "maximum": 3}, "9"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "[]"),
        ({"$ref": "http://x/y"}, "[]"),
        ({"type": "object", "required": ["a"]}, "{}"),
        ({"maxLength": 1}, '"xx"'),
        ({"minimum": 5}, "1"),
        ({"format": "date"}, '"b"'),
        ({"pattern": "^a$"}, '"b"'),
    ],
    ids=str,
)
def test_xgrammar_would_let_wrong_answers_pass(whole: dict[str, Any], wrong: str) -> None:
    """The reason to refuse these; where one is kept to, it need not be refused any more."""
    assert accepts(whole, wrong)
    assert list(passed_over(whole)) != []
