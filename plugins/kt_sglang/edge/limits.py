"""What a request must not ask for, because it would end the scheduler or the HTTP process.

Trigger: a prompt of no tokens; token ids beyond the vocabulary (in `input_ids`, in a `prompt` of ids, or of a tokenizer
that knows more tokens than the model); more logprobs than there are tokens; so many answers (`n`) that the lists of
their prompts fill the memory before one is computed. SGLang takes them unchecked. Safe because no such request could be
answered. Remove when SGLang refuses them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

REQUEST_LEVELS, REQUEST_FORMATS = range(4), ("text", "json")
"""Of SGLang's log of requests."""
MOST_ANSWERS = 128
"""To one prompt, as OpenAI's API has it."""


def around_handle_parallel_sampling(original: Callable[..., Any], request: Any) -> Any:
    """AROUND hook of `GenerateReqInput._handle_parallel_sampling`. Raises ValueError, which SGLang answers with 400."""
    given = request.sampling_params
    for one in given if isinstance(given, list) else [given]:
        count = one.get("n", 1) if isinstance(one, dict) else 1
        if count is not None and (type(count) is not int or not 1 <= count <= MOST_ANSWERS):
            raise ValueError(f"n: got {str(count)[:20]}, expected 1 to {MOST_ANSWERS} answers to a prompt.")
    return original(request)


def around_configure_logging(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """AROUND hook of `TokenizerManager.configure_logging`: SGLang keeps a value that its log of requests has not, and
    every later request fails of it. Raises ValueError."""
    level, form, name = request.log_requests_level, request.log_requests_format, request.log_level
    if level is not None and level not in REQUEST_LEVELS:
        raise ValueError(f"log_requests_level: got {level}, expected 0 to {REQUEST_LEVELS[-1]}.")
    if form is not None and form not in REQUEST_FORMATS:
        raise ValueError(f"log_requests_format: got {form!r}, expected {' or '.join(REQUEST_FORMATS)}.")
    if name is not None and name.upper() not in logging.getLevelNamesMapping():
        raise ValueError(f"log_level: there is no level {name!r}; expected debug, info, warning, error or critical.")
    return original(manager, request)


def around_validate_one_request(original: Callable[..., Any], manager: Any, request: Any, input_ids: Any) -> Any:
    """AROUND hook of `TokenizerManager._validate_one_request`. Raises ValueError, which SGLang answers with 400."""
    size = manager.model_config.vocab_size
    if input_ids is not None and len(input_ids) == 0 and getattr(request, "input_embeds", None) is None:
        raise ValueError("the prompt is empty: it has no token.")
    if input_ids and not manager.model_config.is_multimodal:
        wrong = next((token for token in (min(input_ids), max(input_ids)) if not 0 <= token < size), None)
        if wrong is not None:
            raise ValueError(f"input_ids: there is no token {wrong}; the model's tokens are 0 to {size - 1}.")
    wanted = getattr(request, "top_logprobs_num", None) or 0
    if not 0 <= wanted <= size:
        raise ValueError(f"top_logprobs: got {wanted}, but the model has {size} tokens.")
    return original(manager, request, input_ids)
