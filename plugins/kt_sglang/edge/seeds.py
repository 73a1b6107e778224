"""Seeds of requests on their way to the scheduler, which samples by them (kt_sglang/sampling/seeds.py).

Trigger: a `seed` together with `n`. SGLang sends the same seed with each answer, which would be the same text n times.
Safe because requests without a seed, or with one answer, are passed on as they are. Remove when SGLang tells answers of
one request apart.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

SENT: ContextVar[Counter[int]] = ContextVar(
    "answers of the current request that were sent, by the id of their parameters"
)
APART = 0x9E3779B97F4A7C15
"""How far the seeds of a request's answers are apart, so that they meet those of no other request with a small seed."""


async def around_handle_batch_request(original: Callable[..., Any], manager: Any, *others: Any) -> AsyncIterator[Any]:
    """AROUND hook of `TokenizerManager._handle_batch_request`: begins to count."""
    SENT.set(Counter())
    async for part in original(manager, *others):
        yield part


async def around_send_one_request(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """AROUND hook of `TokenizerManager._send_one_request`: each of several answers to one prompt has its own seed, the
    first one that of the request. SGLang's answers share their parameters until here; what it sends ahead of them to
    fill its cache samples nothing."""
    given, sent = request.sampling_params, SENT.get(None)
    seed = getattr(given, "sampling_seed", None)
    if sent is not None and seed is not None and given.n > 1 and given.max_new_tokens != 0:
        request.sampling_params = copy.copy(given)
        request.sampling_params.sampling_seed = seed_of_answer(seed, sent[id(given)])
        sent[id(given)] += 1
    return await original(manager, request)


def seed_of_answer(seed: int, answer: int) -> int:
    """As a signed number of 64 bits. answer: from 0."""
    return (seed + answer * APART + (1 << 63)) % (1 << 64) - (1 << 63)
