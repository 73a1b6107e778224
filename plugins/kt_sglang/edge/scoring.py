"""Prompts that are only scored: `max_tokens: 0` of /v1/completions, with `echo` and `logprobs`, as evaluations ask.

Trigger: `max_tokens: 0`, which OpenAI's API takes and the form of SGLang's route does not, though its engine does; and
`echo` with `logprobs: 0`, which is the logprobs of all tokens without those of others, and which SGLang takes for no
logprobs of the prompt. Safe because the engine answers with the prompt's logprobs, no token and `length`; what it
leaves in such an answer is taken out, the logprobs of a token that nobody asked for, but only on this route: /v1/score
reads them. Remove when SGLang takes both.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from typing import Any

from kt_sglang.edge.requests import Refused

NO_TOKEN: ContextVar[bool] = ContextVar("the current request asks for an answer without a token", default=False)
FIELD = "max_tokens"
OUTPUT = "output_"
"""How the names of what SGLang tells about generated tokens begin: lists, and the lengths of some."""


class Asked(int):
    """A number of logprobs, of which 0 is one, too."""

    def __bool__(self) -> bool:
        return True


def with_a_token(body: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """(the body of a completion as SGLang's form takes it, whether it asks for no token). Raises Refused."""
    wanted = body.get(FIELD)
    if type(wanted) is int and wanted < 0:
        raise Refused(400, FIELD, f"{FIELD}: got {wanted}, expected at least 0")
    none = type(wanted) is int and wanted == 0
    return {**body, FIELD: 1} if none else dict(body), none


def score_only(request: Any) -> None:
    """Let SGLang's request have no token if the current request asks for none."""
    if NO_TOKEN.get():
        request.sampling_params = {**request.sampling_params, "max_new_tokens": 0}


def score_alone(made: Any, request: Any) -> None:
    """Let SGLang's request have the logprobs of an echoed prompt where those of other tokens are not asked for.
    request: the body of a completion, or of a chat, which has no echo."""
    if getattr(request, "echo", False) and request.logprobs is not None and request.logprobs == 0:
        made.logprob_start_len = 0
        request.logprobs = Asked(0)


async def without_leftovers(answers: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """`answers` of SGLang's engine, single ones or lists of them."""
    async with contextlib.aclosing(answers):  # type: ignore[type-var]
        async for part in answers:
            yield [_cut(each) for each in part] if isinstance(part, list) else _cut(part)


def _cut(part: Any) -> Any:
    """An answer without a token has nothing of one."""
    meta = part.get("meta_info", {}) if isinstance(part, dict) else {}
    if meta.get("finish_reason") is None or meta.get("completion_tokens") != 0:
        return part
    told = [name for name in meta if name.startswith(OUTPUT)]
    empty: dict[str, Any] = {name: [] if isinstance(meta[name], list) else 0 for name in told}
    return {**part, "meta_info": {**meta, **empty}} | ({"output_ids": []} if "output_ids" in part else {})
