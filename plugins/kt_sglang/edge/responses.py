"""OpenAI's /v1/responses: as many tokens as were asked for, no tools that the model would not see, and the temperature
that other routes have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from kt_sglang.edge.defaults import for_responses
from kt_sglang.edge.errors import sentence
from kt_sglang.edge.tools import require_usable_tools


def around_to_sampling_params(
    original: Callable[..., Any],
    request: Any,
    default_max_tokens: int | None = None,
    default_params: dict[str, Any] | None = None,
    *others: Any,
    **more: Any,
) -> Any:
    """AROUND hook of `ResponsesRequest.to_sampling_params`.

    Trigger: `max_output_tokens`, and the room that the context has, of which SGLang takes two off. Safe because they
    are given back only up to the context, which SGLang's scheduler keeps to. Remove when SGLang does so.
    """
    asked = original(request, default_max_tokens, for_responses(default_params), *others, **more)
    bounds = [bound for bound in (request.max_output_tokens, default_max_tokens) if bound is not None]
    return asked | ({"max_new_tokens": min(bounds)} if bounds else {})


async def around_make_request(
    original: Callable[..., Any], serving: Any, request: Any, *others: Any, **more: Any
) -> Any:
    """AROUND hook of `OpenAIServingResponses._make_request`. Raises ValueError, which SGLang answers with 400, and logs
    with its causes; those of pydantic's have the client's words in them."""
    require_usable_tools(serving, request)
    try:
        return await original(serving, request, *others, **more)
    except ValidationError as failure:
        raise ValueError(sentence(failure.errors())[1]) from None
