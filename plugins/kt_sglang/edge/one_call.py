"""At most one call of a tool in an answer, for a client that asks for it: `parallel_tool_calls: false`, or Anthropic's
`disable_parallel_tool_use`.

Trigger: SGLang holds a model to one call only by grammars that few models have, and only some of them with
`tool_choice: auto`; of the others the client got all calls that the model wrote. Safe because the first call is passed
on as it is, and the model sees no other in the next turn; later ones are dropped, but count among the generated tokens.
Remove when SGLang's parsers do so.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

ONE_CALL: ContextVar[bool] = ContextVar("the current request asks for at most one call", default=False)
BEGUN = "kt_begun_calls"
"""Attribute of SGLang's parsers: how many calls a stream has begun."""


def wants_one(body: Mapping[str, Any]) -> bool:
    """Whether a request of any route asks for it."""
    choice = body.get("tool_choice")
    return body.get("parallel_tool_calls") is False or (
        isinstance(choice, dict) and choice.get("disable_parallel_tool_use") is True
    )


def first_of(calls: list[Any]) -> list[Any]:
    """The calls of a whole answer that the client gets."""
    return calls[:1] if ONE_CALL.get() else calls


def first_streamed(parser: Any, calls: list[Any]) -> list[Any]:
    """The parts of calls that the client gets. A call's first part, and no other, has its name."""
    return [part for part in calls if _belongs_to_first(parser, part)] if ONE_CALL.get() else calls


def is_beyond(parser: Any) -> bool:
    """Whether what a stream ends with belongs to a call that the client does not get."""
    detector = getattr(parser, "detector", parser)
    known = len(getattr(detector, "prev_tool_call_arr", None) or ())
    return ONE_CALL.get() and max(known, getattr(parser, BEGUN, 0)) > 1


def _belongs_to_first(parser: Any, part: Any) -> bool:
    begun = getattr(parser, BEGUN, 0) + bool(part.name)
    setattr(parser, BEGUN, begun)
    return begun <= 1
