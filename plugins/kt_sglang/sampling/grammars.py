"""Grammars of requests that cannot be kept to are told in a sentence, and schemas that would be kept to in part are
refused.

Trigger: a `json_schema`, `regex`, `ebnf` or `structural_tag` that xgrammar does not compile: SGLang passes on the place
in xgrammar's sources, or what Python's exception says; and parts of a schema that xgrammar passes over: `allOf` of
several schemas, a `$ref` to another document, `required` properties that are not described, alternatives of which there
is none, what stands beside alternatives or a `$ref`, and bounds of texts and numbers without a `type`. Safe because the
request ends as before, and SGLang itself refuses other keywords that xgrammar passes over. Remove when SGLang says what
is wrong, and refuses these.

What a schema itself says need not be kept to (AT_LIBERTY, which edge/forced_calls.py writes for tools that are not
strict) is any object instead, where it cannot be kept to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

FAILED = re.compile(r"Failed to compile (\w+) grammar: (.*)", re.DOTALL)
FIELDS = {"json": "json_schema", "full_assistant_ebnf": "ebnf"}
"""SGLang's kinds of grammars that have other names than the fields of a request."""
NO_JSON = re.compile(r"[^:]+: (line \d+ column \d+) \(char \d+\)")
"""How Python refuses what is no JSON."""
RAISED = "Grammar compilation failed: "
"""Before what an exception of Python's says that SGLang did not expect."""
DECORATION = re.compile(rf"\[\d\d:\d\d:\d\d\] \S+:\d+: |Check failed: \(.*?\) is (?:false|true): |{RAISED}")
"""Where xgrammar found what it says."""
IN_SCHEMA = re.compile(r"JSON Schema at (\S+) is not supported by xgrammar: (?:keyword\(s\) )?(.*)")
TOO_DEEP = "maximum recursion depth exceeded"
ELSEWHERE = ("$ref", "anyOf", "oneOf", "allOf")
"""Keywords whose schemas xgrammar takes for the whole of a schema."""
BOUNDS = frozenset(
    ("minLength", "maxLength", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "format")
)
"""Of texts and numbers: kept to where a `type` is beside them."""
OF_PARTS = frozenset(
    {
        *("properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties"),
        *("maxProperties", "items", "prefixItems", "minItems", "maxItems"),
    }
)
"""Of objects and lists."""
AT_LIBERTY = "x-kt-at-liberty"
"""Keyword of a schema: names of its $defs which may be any object, if they cannot be kept to."""
WORDS = frozenset({"description", "title", "$comment"})
"""Keywords that say something to readers."""
VALUES = frozenset({"enum", "const", "default", "examples"})
"""Keywords whose value is no schema."""
LONGEST = 300
"""Characters of a reason."""


def around_set_finish_with_abort(
    original: Callable[..., Any], request: Any, message: str, *others: Any, **more: Any
) -> Any:
    """AROUND hook of `Req.set_finish_with_abort`."""
    return original(request, sentence(message), *others, **more)


def sentence(message: str) -> str:
    """What a client reads. message: SGLang's, of any error."""
    if (failed := FAILED.fullmatch(message)) is None:
        return message
    return f"{FIELDS.get(failed[1], failed[1])}: no grammar can be made of it: {reason(failed[2])}."


def reason(said: str) -> str:
    """Why a grammar cannot be compiled, without where in xgrammar or by what exception of Python's that was found."""
    if (no_json := NO_JSON.fullmatch(said)) is not None:
        return f"it is not JSON ({no_json[1]})"
    if TOO_DEEP in said:
        return "it is nested too deeply"
    words = " ".join(DECORATION.sub("", said).split()).rstrip(".")
    if said.startswith(RAISED):
        return "it does not have the form that it should have" + (f" (at {words:.40})" if words else "")
    words = IN_SCHEMA.sub(r"\2, at \1", words)
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}…"


def around_validate_schema(original: Callable[..., None], schema: Any) -> None:
    """AROUND hook of `validate_xgrammar_json_schema`. Raises UnsupportedJSONSchemaFeature."""
    from sglang.srt.constrained.json_schema_validation import UnsupportedJSONSchemaFeature, _iter_subschemas

    original(schema)
    texts: set[int] = set()
    for part, place in _iter_subschemas(schema):
        texts.add(id(part.get("propertyNames")))
        for problem in passed_over({"type": "string", **part} if id(part) in texts else part):
            raise UnsupportedJSONSchemaFeature(f"{problem}, at {place}")


def without_words(grammar: str) -> str:
    """JSON with schemas in it, without what they say to readers; as it is, if it is no JSON."""
    try:
        return json.dumps(_without_words(json.loads(grammar)), separators=(",", ":"), ensure_ascii=False)
    except (ValueError, RecursionError):
        return grammar


def _without_words(part: Any) -> Any:
    if isinstance(part, list):
        return [_without_words(each) for each in part]
    if not isinstance(part, dict):
        return part
    kept = {key: value for key, value in part.items() if not (key in WORDS and isinstance(value, str))}
    return {key: value if key in VALUES else _without_words(value) for key, value in kept.items()}


def around_dispatch_json(original: Callable[..., Any], backend: Any, schema: str) -> Any:
    """AROUND hook of `XGrammarGrammarBackend.dispatch_json`."""
    from sglang.srt.constrained.base_grammar_backend import InvalidGrammarObject

    def is_kept(part: Mapping[str, Any]) -> bool:
        return not isinstance(original(backend, json.dumps(part)), InvalidGrammarObject)

    made = original(backend, schema)
    if not isinstance(made, InvalidGrammarObject) or f'"{AT_LIBERTY}"' not in schema:
        return made
    return original(backend, json.dumps(with_liberties(json.loads(schema), is_kept)))


def with_liberties(schema: dict[str, Any], is_kept: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
    """A schema without what cannot be kept to, as far as it says where nothing has to."""
    named, defined = schema.get(AT_LIBERTY), schema.get("$defs")
    if not isinstance(named, list) or not isinstance(defined, dict):
        return schema
    freed = {
        name: {"type": "object"}
        for name in named
        if isinstance(name, str)
        and name in defined
        and not is_kept({"$ref": f"#/$defs/{name}", "$defs": {name: defined[name]}})
    }
    return {**schema, "$defs": {**defined, **freed}}


def passed_over(part: Mapping[str, Any]) -> Iterator[str]:
    """What xgrammar would not keep to of a schema, or of a part of one."""
    reference, every = part.get("$ref"), part.get("allOf")
    if isinstance(reference, str) and reference != "#" and not reference.startswith("#/"):
        yield f"$ref {reference!r:.60} cannot be followed, only one within the schema, as '#/$defs/name'"
    if isinstance(every, list) and len(every) > 1:
        yield f"allOf of {len(every)} schemas cannot be kept to; write them as one"
    for name in ELSEWHERE[1:]:
        if part.get(name) == []:
            yield f"{name} has no schema"
    elsewhere = [name for name in ELSEWHERE if name in part]
    beside = [*elsewhere[1:], *(name for name in part if name in BOUNDS | OF_PARTS)]
    if elsewhere and beside:
        yield f"{beside[0]} beside {elsewhere[0]} cannot be kept to; write them as one"
    elif not {"type", "enum", "const"} & part.keys():
        yield from (f"{name} without a type cannot be kept to" for name in part if name in BOUNDS)
    required, known = part.get("required"), part.get("properties", {})
    if isinstance(required, list) and isinstance(known, dict):
        for name in required:
            if isinstance(name, str) and name not in known:
                yield f"required names {name!r:.60}, which is not in properties"
