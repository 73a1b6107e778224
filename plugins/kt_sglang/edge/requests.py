"""Where a request carries names, and what it requests by them: SGLang's routes that take a model, one row each. Pure.

SGLang takes an adapter by `model` on some of these routes, by `lora_path` on others, and not at all on the rest. Here
both are read on all of them, validated, and converted to ids and adapter names that SGLang understands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from kt_model.request_names import NAME, cannot_stand
from kt_sglang.edge.names import Meaning, Names, UnknownName


class Model(Enum):
    """What `model` is on a route."""

    OPTIONAL = "a field; without it the base answers"
    REQUIRED = "a field that the protocol demands"
    ABSENT = "no field, but obeyed where it is sent"


@dataclass(frozen=True)
class Route:
    """inside: the key of the object in the body that carries names, if it is not the body itself. nulls_are_absent: as
    OpenAI and Ollama have it; SGLang refuses null for some of its fields, which clients in Java, Go or .NET send.
    empty: fields that SGLang demands, and the protocol does not, as they are when absent. scores: prompts may be scored
    without an answer (scoring.py)."""

    model: Model
    inside: str | None = None
    nulls_are_absent: bool = False
    empty: Mapping[str, Any] = field(default_factory=dict)
    scores: bool = False


_OPTIONAL, _REQUIRED, _ABSENT = Route(Model.OPTIONAL), Route(Model.REQUIRED), Route(Model.ABSENT)
_OPENAI = Route(Model.OPTIONAL, nulls_are_absent=True)

ROUTES: Mapping[str, Route] = {
    "openai_v1_chat_completions": _OPENAI,
    "openai_v1_completions": Route(Model.OPTIONAL, nulls_are_absent=True, scores=True),
    "openai_v1_embeddings": _OPTIONAL,
    "openai_v1_classify": _OPTIONAL,
    "openai_v1_tokenize": _OPTIONAL,
    "openai_v1_detokenize": _OPTIONAL,
    "v1_score_request": _OPTIONAL,
    "v1_decisions_request": _OPTIONAL,
    "v1_responses_request": _OPENAI,
    "sagemaker_chat_completions": _OPENAI,
    "systemone_decisions": _REQUIRED,
    "anthropic_v1_messages": _REQUIRED,
    "anthropic_v1_count_tokens": _REQUIRED,
    "ollama_chat": Route(Model.REQUIRED, nulls_are_absent=True, empty={"messages": []}),
    "ollama_generate": Route(Model.REQUIRED, nulls_are_absent=True, empty={"prompt": ""}),
    "ollama_show": _REQUIRED,
    "generate_request": _ABSENT,
    "encode_request": _ABSENT,
    "classify_request": _ABSENT,
    "v1_rerank_request": _ABSENT,
    "vertex_generate": Route(Model.ABSENT, inside="parameters"),
}
"""SGLang's endpoint function → its row; functions, because some paths are chosen by environment variables."""


class Refused(Exception):
    """An unknown name, or names that contradict each other. param: the invalid field; code: OpenAI's."""

    def __init__(self, status: int, param: str, problem: str, code: str | None = None) -> None:
        super().__init__(problem)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True)
class Understood:
    """body: for SGLang, with ids and adapter names that it knows. asked: None if each row has its own name."""

    body: dict[str, Any]
    asked: Meaning | None


def understand(route: Route, body: dict[str, Any], names: Names) -> Understood:
    """Parse and rewrite the names of one request; `body` itself is not changed. Raises Refused."""
    if route.nulls_are_absent:
        body = {**route.empty, **_without_nulls(body)}
        if isinstance(tools := body.get("tools"), list):
            body["tools"] = [_without_nulls(tool) if isinstance(tool, dict) else tool for tool in tools]
    if route.inside is None:
        return _understand(route.model, body, names, count_prompts(body))
    outer, part = dict(body), body.get(route.inside)
    inner = dict(part) if isinstance(part, dict) else {}
    inner |= {key: outer.pop(key) for key in ("model", "lora_path") if key in outer}
    rows = body.get("instances")
    understood = _understand(route.model, inner, names, len(rows) if isinstance(rows, list) else 0)
    return Understood({**outer, route.inside: understood.body} if inner else body, understood.asked)


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def meaning(param: str, name: Any, names: Names) -> Meaning:
    """The model or adapter that a field names. Raises Refused: a 404 with the nearest id, 400 for a value that is not a
    name."""
    if not isinstance(name, str):
        raise Refused(400, param, f"{param}: expected a name, but got {name!r}")
    try:
        return names.meaning(name)
    except UnknownName as unknown:
        problem = (
            f"{param}: there is no model named {name!r}. Did you mean {unknown.nearest!r}? GET /v1/models lists all."
        )
        raise Refused(404, param, problem, "model_not_found") from unknown


def require_plain_name(body: Any) -> None:
    """Adapters loaded at run time need names of the same form as those at the start. Raises Refused."""
    name = body.get("lora_name") if isinstance(body, dict) else None
    if isinstance(name, str) and not NAME.fullmatch(name):
        raise Refused(400, "lora_name", f"lora_name: {cannot_stand(name)}")


def require_offered(path: str, body: Any, fields: Mapping[str, str]) -> None:
    """fields: those that are not accepted, and why. Raises Refused."""
    for name, reason in fields.items() if isinstance(body, dict) else ():
        if body.get(name) is not None:
            raise Refused(400, name, f"{name} of {path} is not offered: {reason}.", "not_offered")


def count_prompts(body: Mapping[str, Any]) -> int:
    """The number of prompts in a body, whether as text, token ids or embeddings."""
    for name in ("text", "prompt", "input", "input_ids", "input_embeds"):
        rows = body.get(name)
        if isinstance(rows, list) and rows:
            first = rows[0]
            if name == "input_embeds" and isinstance(first, list) and first:
                first = first[0]
            return 1 if isinstance(first, (int, float)) else len(rows)
    return 1


def _understand(kind: Model, body: dict[str, Any], names: Names, prompts: int) -> Understood:
    base, model, path = Meaning(names.base, None), body.get("model"), body.get("lora_path")
    by_model = None if model is None else meaning("model", model, names)
    rows = path if isinstance(path, list) else [] if path is None else [path]
    by_path = [base if row is None else meaning("lora_path", row, names) for row in rows]
    if isinstance(path, list) and len(path) != prompts:
        raise Refused(400, "lora_path", f"lora_path: {len(path)} names for {prompts} prompts; expected one for each")
    asked = _asked(kind, by_model or base, by_path)
    new = dict(body)
    if path is not None:
        new["lora_path"] = asked.adapter if asked else [each.adapter for each in by_path]
    if kind is Model.ABSENT:
        new.pop("model", None)
    elif asked is not None and (kind is Model.OPTIONAL or "model" in body):
        new["model"] = asked.id
    return Understood(new, asked)


def _asked(kind: Model, by_model: Meaning, by_path: list[Meaning]) -> Meaning | None:
    """SGLang's clients send the base's name along with lora_path, so that is not a contradiction."""
    if by_model.adapter and any(each != by_model for each in by_path):
        names = ", ".join(dict.fromkeys(each.id for each in by_path))
        raise Refused(400, "lora_path", f"lora_path names {names}, but model names {by_model.id}")
    if len(set(by_path)) <= 1:
        return by_path[0] if by_path else by_model
    if kind is not Model.ABSENT:
        problem = "lora_path: its rows name different adapters, but an answer of this route names one model"
        raise Refused(400, "lora_path", f"{problem}; ask /generate, or once for each")
    return None
