"""The lists of models: /v1/models and a single one of them, and Ollama's list."""

from __future__ import annotations

from typing import Any

from kt_sglang.edge.adapters import Served, read_served
from kt_sglang.edge.names import Meaning
from kt_sglang.edge.requests import meaning


def answer(name: str, served: Served) -> dict[str, Any]:
    """The answer to GET /v1/models or GET /v1/models/{name}. Raises Refused for an unknown name."""
    if name:
        return card(meaning("model", name, served.names), served)
    return {"object": "list", "data": [card(each, served) for each in served.names.listed]}


def card(each: Meaning, served: Served) -> dict[str, Any]:
    """SGLang's own card, with an id that requests may use."""
    from sglang.srt.entrypoints.openai.protocol import ModelCard

    root = served.paths[each.adapter] if each.adapter else each.id
    parent = served.base if each.adapter else None
    made = ModelCard(id=each.id, root=root, parent=parent, max_model_len=served.context_length)
    return dict(made.model_dump())


def after_get_tags(result: Any, *_: Any) -> Any:
    """AFTER hook of `OllamaServing.get_tags`, which lists the base only."""
    base, names = result.models[0], read_served().names
    result.models = [base.model_copy(update={"name": each.id, "model": each.id}) for each in names.listed]
    return result
