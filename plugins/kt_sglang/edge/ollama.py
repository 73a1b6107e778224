"""Ollama's routes: answers name the model that was requested, and an aborted stream ends with its error.

SGLang takes the name from its tokenizer manager, and reports every end of a stream as `stop`. models.py has the list.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson

from kt_sglang.edge.adapters import ASKED


class Aborted(Exception):
    """Why a stream ended before its answer was complete."""


class AnswersAsAsked:
    """SGLang's tokenizer manager for its Ollama routes."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    @property
    def served_model_name(self) -> str:
        """The requested id, else the base's."""
        asked = ASKED.get()
        return asked.id if asked else str(self._manager.served_model_name)

    async def generate_request(self, request: Any, *others: Any) -> AsyncIterator[Any]:
        """SGLang's answers. Raises Aborted in a stream."""
        async for part in self._manager.generate_request(request, *others):
            reason = part["meta_info"].get("finish_reason")
            if request.stream and isinstance(reason, dict) and reason.get("type") == "abort":
                raise Aborted(reason.get("message"))
            yield part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


def after_ollama_init(result: None, serving: Any, manager: Any) -> None:
    """AFTER hook of `OllamaServing.__init__`."""
    serving.tokenizer_manager = AnswersAsAsked(manager)


async def around_stream(original: Callable[..., Any], serving: Any, *others: Any) -> Any:
    """AROUND hook of `OllamaServing._stream_chat_response` and `_stream_generate_response`. The first line is awaited,
    so that an invalid request is refused instead of answered by half a stream. Raises ValueError."""
    response = await original(serving, *others)
    lines = _with_error(response.body_iterator)
    try:
        first = await anext(lines)
    except StopAsyncIteration:
        first = b""
    response.body_iterator = _begun(first, lines)
    return response


async def _begun(first: bytes, lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for line in lines:
        yield line


async def _with_error(lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Ollama's own form of an error within a stream: a line with only the error. Raises ValueError before the first
    line, for an invalid request."""
    begun = False
    try:
        async for line in lines:
            begun = True
            yield line
    except ValueError as failure:
        if not begun:
            raise
        yield orjson.dumps({"error": str(failure)}) + b"\n"
    except Aborted as failure:
        yield orjson.dumps({"error": str(failure)}) + b"\n"
