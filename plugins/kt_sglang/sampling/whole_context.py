"""A prompt and its answer may fill the context.

Trigger: a prompt that leaves few tokens of the context. SGLang keeps two of them from every answer, and refuses prompts
within seven of the end, without a use for any of them. Safe because the last token of an answer needs no place in the
KV cache, and the step that is in flight when it is known takes the last place of the context, for which all of SGLang's
buffers have room; where the cache is smaller than the context, or a speculative algorithm drafts beyond the answer,
SGLang's own bounds are left. Remove when SGLang gives all of the context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WHOLE, PROMPT = 4, 5
"""Where get_worker_info has max_req_len, of which SGLang keeps one more token from the answer, and max_req_input_len,
which a prompt must be shorter than."""
SPARE, PROMPT_SPARE = 1, 6
"""Tokens of the KV cache that SGLang leaves out of both."""


def around_get_worker_info(original: Callable[..., Any], worker: Any) -> Any:
    """AROUND hook of `TpModelWorker.get_worker_info`."""
    found = list(original(worker))
    context, cache = worker.model_config.context_len, worker.model_runner.effective_logical_max_total_num_tokens
    if worker.dllm_algorithm is None and worker.model_runner.spec_algorithm.is_none():
        found[WHOLE] = max(found[WHOLE], min(context + 1, cache - SPARE))
        found[PROMPT] = max(found[PROMPT], min(context, cache - PROMPT_SPARE))
    return tuple(found)
