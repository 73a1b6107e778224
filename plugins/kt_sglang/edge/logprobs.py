"""Logprobs of streamed chats: those of tokens that bring no text of their own come, too.

Trigger: `logprobs` of a streamed chat, and a token that is a part of a character, that may begin a `stop`, or that ends
the answer. Its step has no chunk, and SGLang drops its logprobs, unless a parser of calls or reasoning is set: of an
emoji of four tokens three were lost. Safe because they come in a chunk without text, as they do where a parser is set.
Remove when SGLang sends them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any


async def around_stream_content(
    original: Callable[..., AsyncIterator[str]], serving: Any, **step: Any
) -> AsyncIterator[str]:
    """AROUND hook of `OpenAIServingChat._generate_stream_content`: the chunks of one step of an answer."""
    from sglang.srt.entrypoints.openai.sse_utils import build_sse_content

    is_told = step["choice_logprobs"] is None
    async for chunk in original(serving, **step):
        is_told = True
        yield chunk
    if not is_told:
        yield build_sse_content(
            chunk_id=step["content"]["meta_info"]["id"],
            created=step["created"],
            model=step["request"].model,
            index=step["index"],
            content="",
            logprobs=step["choice_logprobs"],
        )
