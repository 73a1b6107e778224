"""Anthropic's route: an answer that ended at one of the request's stop_sequences says so, and at which; a stream that
cannot begin is an error.

Trigger: `stop_sequences`. SGLang reports `end_turn`, as if the model had finished. Safe because only what the request
itself names is told; remove when SGLang tells it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

import orjson
from starlette.responses import JSONResponse

from kt_sglang.edge.chat_template import ASSISTANT
from kt_sglang.edge.endings import end_of
from kt_sglang.edge.forms import AT_FAULT, BY_STATUS

STOPS: ContextVar[frozenset[str]] = ContextVar("stop_sequences of the current request", default=frozenset())
BEFORE, STOPPED = "end_turn", "stop_sequence"
DELTA = "message_delta"
BEGUN = 2
"""Events until an answer, or an error instead of it, has begun."""
STATUS = {AT_FAULT: 400} | {kind: status for status, kind in BY_STATUS.items()}
"""Of errors; others are 500."""


def after_convert_request(chat: Any, serving: Any, request: Any) -> Any:
    """AFTER hook of `AnthropicServing._convert_to_chat_completion_request`: by Anthropic's protocol an answer goes on
    from a last message of the assistant."""
    STOPS.set(frozenset(request.stop_sequences or ()))
    last = chat.messages[-1] if chat.messages else None
    if getattr(last, "role", None) == ASSISTANT and not getattr(last, "tool_calls", None):
        chat.continue_final_message = True
    return chat


def after_convert_response(answer: Any, serving: Any, response: Any) -> Any:
    """AFTER hook of `AnthropicServing._convert_response`."""
    matched = response.choices[0].matched_stop if response.choices else None
    if answer.stop_reason == BEFORE and matched in STOPS.get():
        answer.stop_reason, answer.stop_sequence = STOPPED, matched
    return answer


async def around_stream(
    original: Callable[..., Any], serving: Any, adapted: Any, processed: Any, request: Any, *others: Any
) -> AsyncIterator[str]:
    """AROUND hook of `AnthropicServing._generate_anthropic_stream`."""
    stops = frozenset(request.stop_sequences or ())
    async for event in original(serving, adapted, processed, request, *others):
        yield _with_stop(event, adapted, stops) if stops and f"event: {DELTA}\n" in event else event


async def around_handle_streaming(original: Callable[..., Any], serving: Any, *others: Any) -> Any:
    """AROUND hook of `AnthropicServing._handle_streaming`.

    Trigger: a request that cannot be answered, such as one beyond the context. SGLang answers 200 and an event with its
    error. Safe because the first events of an answer come together. Remove when SGLang awaits them.
    """
    response = await original(serving, *others)
    if response.status_code != 200:
        return response
    events = response.body_iterator
    first = [event async for event in _first(events)]
    for event in first:
        if event.startswith("event: error\n"):
            told = orjson.loads(event.split("data: ", 1)[1])
            return JSONResponse(told, STATUS.get(told["error"]["type"], 500))
    response.body_iterator = _begun(first, events)
    return response


async def _first(events: AsyncIterator[str]) -> AsyncIterator[str]:
    for _ in range(BEGUN):
        try:
            yield await anext(events)
        except StopAsyncIteration:
            return


async def _begun(first: list[str], events: AsyncIterator[str]) -> AsyncIterator[str]:
    for event in first:
        yield event
    async for event in events:
        yield event


def _with_stop(event: str, adapted: Any, stops: frozenset[str]) -> str:
    """One server-sent event, of type message_delta."""
    matched = (end_of(adapted).get("finish_reason") or {}).get("matched")
    start, data = event.split("data: ", 1)
    told = orjson.loads(data)
    if matched not in stops or told["delta"].get("stop_reason") != BEFORE:
        return event
    told["delta"] |= {"stop_reason": STOPPED, "stop_sequence": matched}
    return f"{start}data: {orjson.dumps(told).decode()}\n\n"
